"""Where the time of training steps goes: traces of the JAX profiler, summarised by kind of operation and by event."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tli_jax.cli.tables import Table, make_columns

AFTER = 3  # steps before a trace starts: the first compiles, and the next ones may still allocate memory

# The first pattern found in the name of an event decides its kind. On CPUs, matmuls are fusions for YNNPACK.
_KINDS = {
    "collective": r"all[-_]?(gather|reduce|to[-_]?all)|reduce[-_]?scatter|collective|nccl",
    "attention": r"sdpa|attention|fmha|flash|splash|mha",
    "matmul": r"gemm|gemv|dot|matmul|cublas|cutlass|nvjet|xmma|splitk|convolution|ynn",
    "gather, scatter": r"gather|scatter|sort",
    "reduce": r"reduce|softmax",
    "copy": r"copy|memcpy|memset|transpose|slice|concatenate|pad|data formatting",
    "control": r"^(while|call|conditional)\b",
}


class Event(NamedTuple):
    """All events of one name: their number and their milliseconds per device, without those of events inside them."""

    name: str
    kind: str
    calls: float
    ms: float


@contextlib.contextmanager
def trace(folder: Path) -> Iterator[None]:
    """Trace the block into ``folder``, without its Python calls. The block must wait for the devices before it ends."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, profiler_options=options):
        yield


def summarise(folder: Path) -> list[Event]:
    """Read the newest trace in a folder.

    Returns:
        The events on GPUs or TPUs and the time when they were idle, longest first. On a CPU, the XLA operations of all
        threads; they can add up to more than the wall time.

    Raises:
        FileNotFoundError: there is no trace.
    """
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"{folder}: contains no .xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(files[-1])).planes)
    devices = [plane for plane in planes if re.match(r"/device:(GPU|TPU):", plane.name)]
    sums: dict[tuple[str, str], list[float]] = {}
    for plane in devices or [plane for plane in planes if plane.name == "/host:CPU"]:
        spans: list[tuple[float, float]] = []
        for line in plane.lines:
            if devices and not re.match(r"Stream|XLA Ops$", line.name):
                continue
            for name, kind, start, end, own in _operations(line, is_host=not devices):
                spans.append((start, end))
                entry = sums.setdefault((name, kind), [0, 0])
                entry[:] = entry[0] + 1, entry[1] + own
        if devices:
            sums.setdefault(("(idle)", "idle"), [0, 0])[1] += _gaps(spans)
    each = max(1, len(devices))
    events = [Event(*key, count / each, ns / each / 1e6) for key, (count, ns) in sums.items()]
    return sorted(events, key=lambda event: -event.ms)


def tables(events: list[Event], steps: int, top: int = 15) -> list[Table]:
    """Time by kind of operation, and the ``top`` longest events; per step and device."""
    total = sum(event.ms for event in events) or 1.0
    sums = {kind: sum(e.ms for e in events if e.kind == kind) for kind in dict.fromkeys(e.kind for e in events)}
    kinds = sorted(sums.items(), key=lambda item: -item[1])
    rows = [(kind, f"{ms / steps:,.2f}", f"{ms / total:.1%}") for kind, ms in kinds]
    title = f"profile of {steps} step{'s' * (steps != 1)}"
    first = Table(make_columns({"kind": 0}, {"ms/step": 0, "share": 0}), rows, title)
    rows = [(e.name[:70], e.kind, f"{e.calls / steps:,.1f}", f"{e.ms / steps:,.2f}") for e in events[:top]]
    return [first, Table(make_columns({"event": 0, "kind": 1}, {"calls/step": 1, "ms/step": 0}), rows)]


def _operations(line: Any, is_host: bool) -> Iterator[tuple[str, str, float, float, float]]:
    """``(name, kind, start, end, time without the events inside)`` of each operation, in ns."""
    found = []
    for event in line.events:
        # On a CPU, only names distinguish operations from functions of XLA itself: reading the statistics of
        # some events aborts jax 0.12.
        stats = {} if is_host else {str(name): str(value) for name, value in event.stats}
        if not is_host or re.fullmatch(r"[a-z][a-z0-9_.-]*", event.name):
            name = event.name.split(" = ")[0].lstrip("%")  # on TPUs, a name is a line of HLO
            text = " ".join([name, stats.get("hlo_op", ""), stats.get("hlo_category", "")])
            kind = next((kind for kind, words in _KINDS.items() if re.search(words, text, re.I)), "elementwise")
            found.append((name, kind, event.start_ns, event.start_ns + event.duration_ns))
    found.sort(key=lambda item: (item[2], -item[3]))
    own, around = [end - start for *_, start, end in found], list[int]()
    for i, (*_, start, end) in enumerate(found):
        while around and found[around[-1]][3] <= start:
            around.pop()
        if around:
            own[around[-1]] -= min(end, found[around[-1]][3]) - start
        around.append(i)
    return ((*item, max(0.0, ns)) for item, ns in zip(found, own, strict=True))


def _gaps(spans: list[tuple[float, float]]) -> float:
    """Time from the first start to the last end in which nothing ran."""
    gaps, latest = 0.0, min((start for start, _ in spans), default=0.0)
    for start, end in sorted(spans):
        gaps, latest = gaps + max(0.0, start - latest), max(latest, end)
    return gaps
