"""`--precision auto` in the packing process, on a random Llama whose head is large enough to have opinions."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.conftest import pack_here
from safetensors.torch import load_file, save_file

from pipo_ray import packing
from pipo_ray.errors import BudgetError, InputError
from pipo_ray.model.graph import load_config
from pipo_ray.model.inspect import find_facts
from pipo_ray.quant import auto
from pipo_ray.quant.auto import choose_policy, measure_model
from pipo_ray.quant.calibration import CalibrationModel
from pipo_ray.quant.calibration_text import CalibrationText
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.knapsack import Item, Option, choose
from pipo_ray.quant.measure import Measurement, _some_rows
from pipo_ray.quant.policy import Precision
from pipo_ray.quant.rounding import round_to_nearest, values_of
from pipo_ray.quant.sensitivity import Measured, Sensitivity
from pipo_ray.quant.target import Target
from pipo_ray.store.checkpoint import Checkpoint

TEXT = "The quick brown fox jumps over the lazy dog; nobody asked the dog. " * 20
Progress = Callable[[str, int, int], None]


@pytest.fixture(scope="module")
def checkpoint(chat_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(chat_checkpoint, tmp_path_factory.mktemp("auto") / "model"))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = (tensor * (12 if name == "lm_head.weight" else 1)).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def found(checkpoint: Path) -> Any:
    """Facts, which take seconds to find."""
    return find_facts(load_config(checkpoint), torch.bfloat16, checkpoint)


@pytest.fixture(autouse=True)
def small_and_quick(found: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(auto, "find_facts", lambda *_: found)
    monkeypatch.setattr(auto, "WINDOW_TOKENS", 64)
    monkeypatch.setattr(auto, "MEASURED_TOKENS", 128)
    monkeypatch.setattr(auto, "VERIFIED_TOKENS", 256)
    monkeypatch.setattr("pipo_ray.quant.calibration_text.LEAST_TOKENS", 256)
    monkeypatch.setattr("pipo_ray.quant.calibration.usable_threads", lambda: 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path: Path) -> CalibrationText:
    file = tmp_path / "text"
    file.write_text(TEXT)
    return CalibrationText.load(file)


def run(checkpoint: Path, target: Target, cache: Path, text: CalibrationText, progress: Progress | None = None) -> Any:
    return choose_policy(checkpoint, target, cache=cache, text=text, progress=progress or (lambda *_: None))


@torch.inference_mode()
def reference(checkpoint: Path, windows: list[list[int]], formats: dict[str, str]) -> tuple[float, float]:
    """KL divergence and increase of the mean loss by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    passes = []
    for rounds in (False, True):
        for name, format in formats.items():
            if rounds and format != "16bit":
                weight, low_bit = model.get_parameter(name), LowBitFormat.parse(format)
                weight.copy_(values_of(round_to_nearest(weight, low_bit), low_bit))
        logits = [model(torch.tensor([window])).logits[0, :-1] for window in windows]
        passes.append(torch.cat(logits).double().log_softmax(-1))
    original, rounded = passes
    following = torch.cat([torch.tensor(window[1:]) for window in windows])[:, None]
    kl = (original.exp() * (original - rounded)).sum(-1).mean()
    return float(kl), float((original - rounded).gather(1, following).mean())


def test_it_is_what_transformers_says_and_holds(checkpoint: Path, tmp_path: Path, text: CalibrationText) -> None:
    calls: list[tuple[str, int, int]] = []
    chosen = run(checkpoint, Target(max_loss=0.02), tmp_path / "cache", text, lambda *call: calls.append(call))
    with auto.Subject.open(checkpoint) as subject:
        windows = subject.windows(text, auto.WINDOW_TOKENS, auto.VERIFIED_TOKENS)
        rules = {one.name: chosen.policy.rule_for(one.name) for one in subject.candidates.weights}
    formats = {name: rule.format if rule else "16bit" for name, rule in rules.items()}
    assert len(set(formats.values())) > 1
    kl, more = reference(checkpoint, windows, formats)
    assert chosen.kl == pytest.approx(kl, rel=1e-2, abs=1e-6)
    assert math.log1p(chosen.perplexity_increase) == pytest.approx(more, rel=1e-2, abs=1e-5)
    assert 0.1 * math.log1p(0.02) < max(kl, more) <= math.log1p(0.02)
    # One phase, that only grows and comes to its end.
    done = [call for call in calls if call[0] == "sensitivity"]
    assert [call[1] for call in done] == sorted(call[1] for call in done)
    assert [call[1] >= call[2] for call in done].index(True) == len(done) - 1


def test_a_size_is_kept_and_less_is_impossible(
    checkpoint: Path, tmp_path: Path, text: CalibrationText, monkeypatch: pytest.MonkeyPatch
) -> None:
    with auto.Subject.open(checkpoint) as subject:
        sizes = [one.sizes for one in subject.candidates.weights]
        least, most = (sum(pick(one.values()) for one in sizes) + subject.candidates.fixed_bytes for pick in (min, max))
    middle = run(checkpoint, Target(max_bytes=(least + most) // 2), tmp_path, text)
    assert 0.9 * (least + most) / 2 < middle.nbytes <= (least + most) // 2
    # The other target needs one pass over the original and one over what was chosen.
    passes: list[object] = []
    compare = Measurement.compare
    monkeypatch.setattr(Measurement, "compare", lambda *args: passes.append(args) or compare(*args))
    coarsest = run(checkpoint, Target(max_bytes=least), tmp_path, text)
    assert len(passes) == 1
    assert coarsest.nbytes == least
    assert coarsest.kl > middle.kl
    everything = run(checkpoint, Target(max_bytes=most), tmp_path, text)
    assert (everything.kl, everything.policy.is_low_bit, everything.least) == (0, False, None)
    monkeypatch.setattr(CalibrationModel, "logits", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(InputError, match=r"--max-size .* is too little for this model: with the fewest bits it takes"):
        run(checkpoint, Target(max_bytes=least - 1), tmp_path, text)


def test_a_loss_that_no_rounding_keeps_is_told_from_one_that_some_does(
    checkpoint: Path, tmp_path: Path, text: CalibrationText
) -> None:
    chosen = run(checkpoint, Target(max_loss=1e-9), tmp_path, text)
    assert (chosen.kl, chosen.policy.is_low_bit) == (0, False)
    items = measure_model(checkpoint, cache=tmp_path, text=text, progress=lambda *_: None).items
    losses = {(item.name, o.format): o.loss for item in items for o in item.options if o.format != "16bit"}
    assert chosen.least is not None
    assert chosen.least.kl == min(losses.values()) == losses[chosen.least.name, chosen.least.format] > 1e-9
    more = run(checkpoint, Target(max_loss=0.02), tmp_path, text)
    assert (more.policy.is_low_bit, more.least) == (True, None)


def test_int4_in_three_groups_beats_one_of_the_same_bytes(
    chat_checkpoint: Path,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    text: CalibrationText,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(auto, "find_facts", find_facts)
    folder = Path(shutil.copytree(chat_checkpoint, tmp_path / "wide"))
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}
    shutil.copytree(
        tiny_checkpoint("LlamaConfig", vocab_size=259, dtype="bfloat16", **sizes), folder, dirs_exist_ok=True
    )
    with auto.Subject.open(folder) as subject:
        candidates = subject.candidates
        windows = subject.windows(text, auto.WINDOW_TOKENS, auto.VERIFIED_TOKENS)
    uniform = sum(one.sizes["int4-g64"] for one in candidates.weights)
    assert uniform > sum(one.sizes["int4-g128"] for one in candidates.weights)
    chosen = run(folder, Target(max_bytes=uniform + candidates.fixed_bytes), tmp_path / "cache", text)
    rules = {one.name: chosen.policy.rule_for(one.name) for one in candidates.weights}
    formats = {name: rule.format if rule else "16bit" for name, rule in rules.items()}
    assert {"int4-g128", "int4-g32"} <= set(formats.values())
    mixed, _ = reference(folder, windows, formats)
    same, _ = reference(folder, windows, dict.fromkeys(formats, "int4-g64"))
    assert mixed < same


def test_estimates_that_are_too_good_are_found_out(
    checkpoint: Path, tmp_path: Path, text: CalibrationText, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = Sensitivity.items

    def optimistic(self: Sensitivity, candidates: Any) -> Any:
        return items(
            Sensitivity(self.tokens, self.errors, {k: v / 30 for k, v in self.divergences.items()}), candidates
        )

    honest = run(checkpoint, Target(max_loss=0.02), tmp_path, text)
    monkeypatch.setattr(Sensitivity, "items", optimistic)
    corrected = run(checkpoint, Target(max_loss=0.02), tmp_path, text)
    assert max(corrected.kl, math.log1p(corrected.perplexity_increase)) <= math.log1p(0.02)
    assert corrected.nbytes < 1.2 * honest.nbytes


class Listener:
    def progress(self, phase: str, done: int, total: int) -> None:
        pass


class StoppedError(Exception):
    """Measuring is interrupted."""


def test_it_goes_on_where_it_stopped(checkpoint: Path, tmp_path: Path, text: CalibrationText) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if phase == "sensitivity" and done > total / 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        run(checkpoint, Target(max_loss=0.02), tmp_path, text, stop)
    (file,) = tmp_path.glob("*.json")
    begun = json.loads(file.read_text())
    assert 1 < len(begun["divergences"]) < 7
    begun["divergences"] = dict.fromkeys(begun["divergences"], 7.0)  # would be seen if it were measured again
    file.write_text(json.dumps(begun))
    run(checkpoint, Target(max_loss=0.02), tmp_path, text)
    whole = json.loads(file.read_text())["divergences"]
    assert [name for name, value in whole.items() if value == 7.0] == list(begun["divergences"])


@torch.inference_mode()
def test_errors_are_those_of_products(checkpoint: Path, tmp_path: Path, text: CalibrationText) -> None:
    from transformers import AutoModelForCausalLM

    measure_model(checkpoint, cache=tmp_path, text=text, progress=lambda *_: None)
    (file,) = tmp_path.glob("*.json")
    known = json.loads(file.read_text())
    with auto.Subject.open(checkpoint) as subject:
        windows = subject.windows(text, auto.WINDOW_TOKENS, auto.VERIFIED_TOKENS)
    windows = windows[: auto.windows_with(windows, auto.MEASURED_TOKENS)]
    assert known["tokens"] == sum(map(len, windows))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    name = "model.layers.1.mlp.up_proj"
    inputs: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda module, args, output: inputs.append(args[0][0]))
    for window in windows:
        model(torch.tensor([window]))
    weight, rows = model.get_parameter(f"{name}.weight"), torch.cat(inputs)
    assert known["errors"][f"{name}.weight"].keys() == {"int4-g64", "int4-g32", "int8"}
    for format, error in known["errors"][f"{name}.weight"].items():
        low_bit = LowBitFormat.parse(format)
        change = values_of(round_to_nearest(weight, low_bit), low_bit) - weight
        expected = (rows @ change.T).square().sum() / (rows @ weight.T).square().sum()
        assert error == pytest.approx(float(expected), rel=1e-3)


def test_a_planner_chooses_for_itself(checkpoint: Path, tmp_path: Path, text: CalibrationText) -> None:
    measured = measure_model(checkpoint, cache=tmp_path, text=text, progress=lambda *_: None)
    assert Measured.from_json(json.loads(json.dumps(measured.to_json()))) == measured

    def seconds(item: Item, option: Option) -> float:
        """A machine on which int8 is slower than 16 bits."""
        return option.nbytes * (3.0 if option.format == "int8" else 1.0)

    most = sum(item.options[0].loss for item in measured.items) / 2
    choice = choose(measured.items, max_loss=most, cost=seconds)
    policy = measured.policy(choice.formats)
    assert 0 < choice.loss <= most
    assert "int8" not in {rule.format for rule in policy.rules}
    assert policy.model is not None


def test_the_planner_of_the_readme_runs(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "measure_precision" in block)
    pack_here(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert '"pipo_ray/bundled"' in code
    found: dict[str, Any] = {}
    exec(code.replace('"pipo_ray/bundled"', repr(str(checkpoint))), found)
    assert 0 < found["choice"].loss <= 0.01
    saved = Precision.load(tmp_path / "policy.json")
    assert {rule.format for rule in saved.rules} == set(found["choice"].formats.values())
    with Checkpoint.open(checkpoint) as opened:
        saved.require_model(opened)


def test_measuring_keeps_within_the_memory(
    checkpoint: Path, tmp_path: Path, text: CalibrationText, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the last pass needs is asked for before the first: nothing is measured with too little."""
    asked: list[int] = []
    enough = CalibrationModel.require_memory

    def require(self: CalibrationModel, windows: Any, more_bytes: int = 0) -> None:
        asked.append(self.required_bytes(windows) + more_bytes)
        enough(self, windows, more_bytes)

    monkeypatch.setattr(CalibrationModel, "require_memory", require)
    run(checkpoint, Target(max_loss=0.02), tmp_path / "all", text)
    assert asked[0] == max(asked)
    arguments = [str(checkpoint), str(tmp_path / "cache"), f"--text={text.file}"]
    monkeypatch.setattr(CalibrationModel, "logits", lambda *_: pytest.fail("something was measured"))
    target = json.dumps(Target(max_loss=0.02).to_json())
    for job in (
        ["choose", *arguments, f"--memory={asked[0] - 1}", f"--target={target}"],
        ["measure", *arguments, f"--memory={700 << 20}"],
    ):
        with pytest.raises(BudgetError, match=r"tokens of calibration text needs .* are given: raise --memory to"):
            packing._job(packing._arguments(job), Listener())  # type: ignore[arg-type]


def test_rows_for_errors_are_taken_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipo_ray.quant.measure._ERROR_TOKENS", 7)
    for lengths in ([5], [5, 9, 1, 2], [1] * 20):
        parts = list(torch.arange(float(sum(lengths)))[:, None].split(lengths))
        whole = torch.cat(parts)
        assert torch.equal(_some_rows(parts), whole[:: -(-len(whole) // 7)])


def test_a_text_that_is_too_short(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("Too short.")
    with pytest.raises(InputError, match=r"short has 10 tokens, at least 256 are needed"):
        run(checkpoint, Target(max_loss=0.02), tmp_path, CalibrationText.load(tmp_path / "short"))
