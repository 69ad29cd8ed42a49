"""Traces of training steps on a CPU, and their summaries."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from tli_jax.cli.console import console
from tli_jax.training import profile


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """Two steps of a small network, after an older trace that must not be read."""
    folder = tmp_path_factory.mktemp("profile")
    (folder / "old.xplane.pb").write_bytes(b"")

    @jax.jit
    def step(w_LDD, x_BD):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BD, w_LDD)[0].sum()

    w, x = jnp.ones((3, 256, 256)), jnp.ones((64, 256))
    step(w, x).block_until_ready()
    with profile.trace(folder):
        for _ in range(2):
            step(w, x).block_until_ready()
    return profile.summarise(folder)


def test_kinds_counts_and_times(events):
    kinds = {event.kind for event in events}
    assert {"matmul", "control"} <= kinds and "idle" not in kinds
    matmul = next(event for event in events if event.kind == "matmul")
    assert matmul.calls == 2 * 3  # steps × iterations of the loop
    assert [event.ms for event in events] == sorted((event.ms for event in events), reverse=True)
    assert all(event.ms >= 0 and event.calls > 0 for event in events)
    # A loop contains the operations of its body, whose time must not count twice.
    loop = next(event for event in events if event.kind == "control")
    assert loop.ms < sum(event.ms for event in events) / 2


def test_tables(events, capsys):
    kinds, longest = profile.tables(events, steps=2, top=3)
    assert len(longest.rows) == 3 and longest.rows[0][0] == events[0].name
    assert sum(float(row[2].rstrip("%")) for row in kinds.rows) == pytest.approx(100, abs=1)
    kinds.render(console())
    assert "profile of 2 steps" in capsys.readouterr().out


def test_no_trace(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"contains no \.xplane\.pb"):
        profile.summarise(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("nvjet_tst_192x192_64x4_1x2_h_bz_coopB_TNN", "matmul"),
        ("sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x32", "matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matmul"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collective"),
        ("%all-reduce.3 = f32[8]{0} all-reduce(f32[8]{0} %x)", "collective"),
        ("MemcpyD2D", "copy"),
        ("loop_dynamic_update_slice_fusion_2", "copy"),
        ("input_scatter_fusion", "gather, scatter"),
        ("input_reduce_fusion_4", "reduce"),
        ("loop_select_fusion", "elementwise"),
    ],
)
def test_names_of_accelerators(name, kind, monkeypatch, tmp_path):
    """Planes as GPUs and TPUs have them: two devices of which one does nothing, and an idle gap."""

    def event(start, duration):
        return SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=[])

    lines = [
        SimpleNamespace(name="Stream #13(Compute)", events=[event(0, 2e6), event(5e6, 1e6)]),
        SimpleNamespace(name="Stream #14(MemcpyD2D)", events=[event(1e6, 2e6)]),
        SimpleNamespace(name="XLA Modules", events=[event(0, 9e6)]),
    ]
    planes = [
        SimpleNamespace(name="/device:GPU:0", lines=lines),
        SimpleNamespace(name="/device:GPU:1", lines=[]),
        SimpleNamespace(name="/host:CPU", lines=lines),
    ]
    data = SimpleNamespace(from_file=lambda file: SimpleNamespace(planes=planes))
    monkeypatch.setattr(jax.profiler, "ProfileData", data)
    (tmp_path / "host.xplane.pb").touch()
    busy, idle = profile.summarise(tmp_path)
    assert (busy.kind, busy.calls, busy.ms) == (kind, 1.5, 2.5)
    assert (idle.kind, idle.ms) == ("idle", 1.0)
