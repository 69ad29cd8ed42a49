"""A train step that does not fit in memory is refused before the first step; ``auto`` finds the fastest policy."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

import tli_jax
from tli_jax.distributed.mesh import make_mesh
from tli_jax.errors import UsageError
from tli_jax.training import fit as module
from tli_jax.training.fit import cache_programs, fit, free_memory, require_fit
from tli_jax.training.memory import POLICIES, compile_step


@pytest.fixture(scope="module")
def peaks(build):
    """The peak of each policy, where activations matter."""
    return {remat: compile_step(make(build, remat), 256, lambda spec: "float32").peak for remat in POLICIES}


def make(build, remat):
    return build(remat=remat, batch_size=16)[0]


def run(build, remat, limit, **options):
    lines = []
    programs, memory = fit(make(build, remat), 256, lambda spec: "float32", limit, lines.append, **options)
    return programs.config.remat, memory, lines


def test_each_policy_needs_less_memory_than_the_faster_one(peaks):
    assert list(peaks) == ["none", "dots", "attention", "full"]
    assert sorted(peaks.values(), reverse=True) == list(peaks.values())


def test_auto_is_the_fastest_that_fits(build, peaks):
    assert run(build, "auto", 1e12)[0] == "none"
    policy, memory, lines = run(build, "auto", (peaks["attention"] + peaks["full"]) / 2)
    assert policy == "full" and memory.fits and memory.peak == peaks["full"]
    assert [line.split(":")[0] for line in lines] == ["remat none", "remat dots", "remat attention"]


def test_a_resumed_run_keeps_its_policy_while_it_fits(build, peaks):
    assert run(build, "auto", 1e12, first="full")[0] == "full"
    held = run(build, "auto", peaks["none"] / 2, held=lambda memory: peaks["none"])
    assert held[0] == "none"  # what is in memory already needs no free memory


def test_what_does_not_fit_is_refused_with_a_remedy(build, peaks):
    trainer = make(build, "full")
    found, memory = fit(trainer, 256, lambda spec: "float32", 1e5, print)
    with pytest.raises(UsageError, match=r"does not fit: it needs \S+ MiB of \S+ MiB per device; try --train\."):
        require_fit(found, 256, memory, 1e5)
    require_fit(found, 256, *fit(trainer, 256, lambda spec: "float32", 1e12, print)[1:], 1e12)


def test_without_a_known_limit_nothing_is_compiled(build):
    policy, memory, lines = run(build, "auto", None)
    assert policy == "full" and memory is None and "not known" in lines[0]


def test_free_memory_is_shared_by_the_devices_of_a_host(monkeypatch):
    monkeypatch.setattr(module, "_meminfo", lambda name: 8e9)
    if jax.devices()[0].platform != "cpu":
        pytest.skip("only on a CPU")
    assert free_memory(make_mesh({})) <= 1e9
    assert free_memory(make_mesh({}, jax.devices()[:2])) <= 4e9


def test_accelerators_keep_compiled_programs(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    mesh = make_mesh({})
    assert cache_programs(mesh) is None and jax.config.jax_compilation_cache_dir == before
    accelerator = SimpleNamespace(devices=np.asarray([SimpleNamespace(platform="tpu")]))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert cache_programs(accelerator) == f"{tmp_path}/tli_jax/compiled"
        jax.config.update("jax_compilation_cache_dir", "chosen")
        assert cache_programs(accelerator) == "chosen"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_trainer_refuses_what_does_not_fit(monkeypatch):
    monkeypatch.setattr("tli_jax.training.trainer.free_memory", lambda mesh: 1e6)
    config, _ = tli_jax.load_hf("embedded")
    with pytest.raises(UsageError, match="does not fit"):
        tli_jax.Trainer.create(config, batch_size=8, sequence_length=64)
