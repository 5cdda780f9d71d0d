"""From what the user names to a packed store, with real checkpoints and the real child process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pipo_ray.packing_process
import pipo_ray.prepare
from pipo_ray.auto_precision import choose_precision
from pipo_ray.cli import main
from pipo_ray.errors import CheckpointError, InputError, PipoError, ResourceError, StoreError, UnsupportedModelError
from pipo_ray.packing import own_precision
from pipo_ray.prepare import PreparedStore, cache_folder, find_model, pack_store, prepare_store
from pipo_ray.quant.policy import POLICY_KEY, Precision
from pipo_ray.quant.target import Target
from pipo_ray.store.manifest import JOURNAL_NAME, Manifest

from .conftest import pack_here

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def checkpoint(chat_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of our own, because tests change it."""
    return Path(shutil.copytree(chat_checkpoint, tmp_path_factory.mktemp("prepare") / "my model"))


@pytest.fixture(scope="module")
def prepared(checkpoint: Path) -> PreparedStore:
    return prepare_store(str(checkpoint))


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """No child process may be started."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a child process was started"))


# --- packed once -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_packed_into_the_cache(prepared: PreparedStore, checkpoint: Path) -> None:
    assert prepared.packed_now
    assert prepared.folder.parent == cache_folder() / "stores"
    assert prepared.folder.name.startswith("my-model-float32-")
    assert prepared.manifest.precision == "float32"
    assert prepared.facts.model_type == "llama"
    assert (prepared.folder / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


@pytest.mark.usefixtures("no_child")
def test_the_second_time_it_is_there(prepared: PreparedStore, checkpoint: Path) -> None:
    for model in (checkpoint, str(prepared.folder)):
        again = prepare_store(model)
        assert (again.folder, again.manifest, again.facts) == (prepared.folder, prepared.manifest, prepared.facts)
        assert not again.packed_now
    assert prepare_store(checkpoint, dtype="float32").folder == prepared.folder


@pytest.mark.usefixtures("no_child")
def test_a_changed_chat_template_is_carried_over(prepared: PreparedStore, checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    assert not prepare_store(checkpoint).packed_now
    assert (prepared.folder / "chat_template.jinja").read_text() == "{{ messages[-1].content }}"


def test_a_damaged_store_in_the_cache_is_packed_again(prepared: PreparedStore, checkpoint: Path) -> None:
    file = next(iter(prepared.manifest.files))
    os.truncate(prepared.folder / file, 4096)
    calls: list[tuple[str, int, int]] = []
    again = prepare_store(checkpoint, on_progress=lambda *call: calls.append(call))
    assert again.packed_now
    assert again.folder == prepared.folder
    assert calls[0] == ("inspect", 0, 0)
    assert calls[-1][0] == "pack"
    assert calls[-1][1] == calls[-1][2] > 0


@pytest.mark.usefixtures("no_child")
def test_a_store_is_not_converted(prepared: PreparedStore) -> None:
    with pytest.raises(InputError, match="holds float32; leave --dtype out, or pack the checkpoint again"):
        prepare_store(prepared.folder, dtype="bfloat16")


@pytest.fixture(scope="module")
def low_bit(checkpoint: Path) -> PreparedStore:
    with pytest.MonkeyPatch.context() as patch:
        pack_here(patch)
        return prepare_store(checkpoint, precision="int8")


def test_low_bit_weights_have_a_store_of_their_own(
    prepared: PreparedStore, low_bit: PreparedStore, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert low_bit.packed_now
    assert low_bit.folder.name.startswith("my-model-int8-")
    assert low_bit.manifest.precision == "bfloat16"
    assert {t.panels.format for b in low_bit.manifest.blocks for t in b.tensors if t.panels} == {"int8"}
    assert low_bit.manifest.total_bytes < prepared.manifest.total_bytes / 2
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a child process was started"))
    assert prepare_store(checkpoint, precision="int8").folder == low_bit.folder
    assert prepare_store(low_bit.folder, precision="int8").manifest == low_bit.manifest
    assert prepare_store(low_bit.folder).facts == low_bit.facts
    assert prepare_store(prepared.folder, precision="16bit").folder == prepared.folder


def test_pack_says_the_bits(low_bit: PreparedStore, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr(pipo_ray.prepare, "pack_store", lambda *_, **options: asked.update(options) or low_bit.manifest)
    assert main(["pack", "somewhere", "elsewhere", "--precision", "int8"]) == 0
    assert asked["precision"] == "int8"
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("precision: ")]
    assert " in int8 with " in said


def test_another_processor_has_a_store_of_its_own(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipo_ray.store.checkpoint import Checkpoint

    with Checkpoint.open(checkpoint) as opened:
        names = set()
        for layout in ("avx512", "avx2"):
            monkeypatch.setattr(pipo_ray.prepare, "machine_layout", lambda layout=layout: layout)
            for policy in ("int4", "int4-g32", "16bit"):
                names.add(pipo_ray.prepare._store_name(opened, "bfloat16", Precision.parse(policy), None))
    assert len(names) == 5


@pytest.mark.usefixtures("no_child")
def test_low_bit_mistakes(prepared: PreparedStore, low_bit: PreparedStore, checkpoint: Path) -> None:
    with pytest.raises(InputError, match="holds int8; leave --precision out, or pack the checkpoint again"):
        prepare_store(low_bit.folder, precision="int4")
    with pytest.raises(InputError, match="holds 16bit; leave --precision out"):
        prepare_store(prepared.folder, precision="int8")
    with pytest.raises(InputError, match=r"--dtype float32 with --precision int8: .* in bfloat16; leave --dtype out"):
        prepare_store(checkpoint, dtype="float32", precision="int8")
    with pytest.raises(InputError, match="'int3' has 3 bits"):
        prepare_store(checkpoint, precision="int3")
    with pytest.raises(InputError, match="groups of 100 columns, supported are 32, 64, 128"):
        pack_store(checkpoint, checkpoint / "store", precision="int4-g100")


@pytest.mark.usefixtures("packed_in_this_process")
def test_columns_that_groups_do_not_divide(checkpoint: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"rules": [["*.q_proj.weight", "int4-g128"]]}))
    with pytest.raises(InputError) as raised:
        pack_store(checkpoint, tmp_path / "store", precision=str(policy))
    assert f'precision policy {policy}: rule ["*.q_proj.weight", "int4-g128"]: ' in str(raised.value)
    assert "q_proj.weight cannot be int4-g128: groups of 128 need a multiple of 128 columns" in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]


@pytest.mark.slow
def test_another_transformers_finds_the_facts_anew(prepared: PreparedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipo_ray.prepare, "installed_transformers", lambda: "99.0")
    found = prepare_store(prepared.folder)
    assert found.facts == prepared.facts  # of the version that is really there
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a child process was started"))
    assert prepare_store(prepared.folder).facts == found.facts
    assert list((cache_folder() / "facts").glob("*.json"))


@pytest.mark.parametrize(
    "config, precision",
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"dtype": None, "text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"dtype": "float64"}, "float32"),
        ({"text_config": 5}, "float32"),
    ],
)
def test_the_precision_of_a_checkpoint(config: dict[str, object], precision: str) -> None:
    assert own_precision(config) == precision


def test_the_driver_stays_light(prepared: PreparedStore, checkpoint: Path) -> None:
    code = (
        "import sys\nfrom pipo_ray.prepare import prepare_store\nassert not prepare_store(sys.argv[1]).packed_now\n"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'ray'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(checkpoint)], check=True, timeout=60)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for cache, xdg, wanted in [
        ("/c", "/x", "/c"),
        ("", "/x", "/x/pipo"),
        ("", "", "/home/me/.cache/pipo"),
        ("", "relative", "/home/me/.cache/pipo"),
        ("~/c", "", "/home/me/c"),
    ]:
        monkeypatch.setenv("PIPO_CACHE", cache)
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
        assert cache_folder() == Path(wanted)


# --- what MODEL may be -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("model", ["./nothing", "/nothing/here", "a/b/c", "../x", "~/nothing", "here/name", "a b/c"])
def test_a_path_that_is_not_there_is_no_hub_id(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(CheckpointError, match=f"^no such folder: {model};"):
        find_model(model)


@pytest.mark.usefixtures("no_child")
def test_what_is_no_model_is_refused_before_a_process_is_started(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text('{"model_type": "llama"}')
    for model, what in [
        ("", "MODEL is ''"),
        (str(tmp_path / "file"), "a file, not a folder"),
        (str(tmp_path / "link"), "a link to nothing"),
        (str(tmp_path), "no config.json"),
        (str(tmp_path / "bare"), "no weights"),
        ("x" * 300, "File name too long"),
    ]:
        with pytest.raises(InputError, match=what):
            prepare_store(model)
    with pytest.raises(InputError, match="'int3' is not known"):
        prepare_store(tmp_path, dtype="int3")
    (tmp_path / "bare" / JOURNAL_NAME).write_text("")
    with pytest.raises(StoreError, match="half packed"):
        prepare_store(tmp_path / "bare")


@pytest.mark.parametrize("model", ["some-org/some-model", "some-model"])
def test_a_hub_id_without_a_network_is_a_clear_error(model: str, capsys: Capture) -> None:
    start = time.monotonic()
    with pytest.raises(ResourceError, match=f"model {model} is not a folder and not in the hub's cache, .*folder of"):
        find_model(model)
    assert time.monotonic() - start < 30


def test_a_hub_model_in_the_hubs_cache_needs_no_network(
    chat_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub/models--some-org--some-model"
    shutil.copytree(chat_checkpoint, repository / "snapshots/0123456789012345678901234567890123456789")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123456789012345678901234567890123456789")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = find_model("some-org/some-model")
    assert folder.parent.parent == repository
    assert (folder / "model.safetensors").is_file()


# --- what goes wrong in the child ------------------------------------------------------------------------------------


def test_an_unsupported_architecture_is_refused_by_name(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "nosuch"}))
    with pytest.raises(UnsupportedModelError, match="'nosuch'"):
        prepare_store(model, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_refused_weights_leave_no_empty_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    weights = model / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-4:] = b"\xff\xff\xff\x7f"  # a NaN
    weights.write_bytes(raw)
    with pytest.raises(PipoError, match="NaN"):
        prepare_store(model, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    (tmp_path / "cache/stores/another").mkdir(parents=True)
    pack_here(monkeypatch)
    with pytest.raises(PipoError, match="NaN"):
        prepare_store(model, cache=tmp_path / "cache")
    assert (tmp_path / "cache/stores/another").is_dir()


@pytest.mark.parametrize(
    "code, kind, what",
    [
        ("import os; os.kill(os.getpid(), 9)", ResourceError, "ended by SIGKILL, most likely because memory ran out"),
        ("import os; os.kill(os.getpid(), 11)", ResourceError, "ended by SIGSEGV; run it again"),
        ("raise ImportError('no torch here')", PipoError, "status 1: ImportError: no torch here"),
    ],
)
def test_a_child_that_dies_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, kind: type[PipoError], what: str
) -> None:
    monkeypatch.setattr(pipo_ray.packing_process, "_CHILD", code)
    with pytest.raises(kind, match=what):
        prepare_store(checkpoint, cache=tmp_path)


def test_a_module_in_the_current_folder_is_not_taken_for_pythons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    with pytest.raises(ResourceError, match="not in the hub's cache"):
        find_model("some-org/some-model")


STOPPED_IN_A_FINALIZER = """
import os, signal, time, weakref
from pipo_ray import packing

def stop():
    os.kill(os.getpid(), signal.SIGTERM)
    sum(range(3))

def job(options, channel):
    weakref.finalize(set(), stop)  # Python calls it at once, and drops what it raises
    for _ in range(100):
        time.sleep(0.1)
    return {}

packing._job = job
os._exit(packing.main(["facts", "a store"]))
"""


def test_the_order_to_stop_is_obeyed_when_it_comes_while_an_object_is_finalized() -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen([sys.executable, "-c", STOPPED_IN_A_FINALIZER], **pipes) as child:  # type: ignore[call-overload]
        assert child.stdout is not None
        assert child.stdout.read() == b""  # and not because its stdin was closed
        assert child.wait() == 130


def child_of(pid: int) -> int | None:
    """The child that packs."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and b"pipo_ray.packing" in (entry.parent / "cmdline").read_bytes():
                return int(entry.parent.name)
        except OSError:
            continue
    return None


@pytest.fixture
def packing(checkpoint: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`pipo pack`, busy, and its child."""
    command = [sys.executable, "-m", "pipo_ray.cli", "pack", str(checkpoint), str(tmp_path / "store")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    assert "looking at the model" in process.stderr.readline()
    child = child_of(process.pid)
    assert child is not None
    yield process, child
    process.kill()
    process.wait()
    process.stderr.close()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_the_child_never_outlives_its_parent(
    packing: tuple[subprocess.Popen[str], int], tmp_path: Path, number: int, status: int
) -> None:
    process, child = packing
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    assert process.wait(20) == status
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert not (tmp_path / "store").exists()


# --- pipo pack, pipo verify ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("packed_in_this_process")
def test_pack_and_verify(tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    source, store = tiny_checkpoint("Qwen2Config"), tmp_path / "deep/store"
    capsys.readouterr()
    assert main(["pack", str(source), str(store), "--dtype", "bfloat16"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "looking at the model"
    assert err.splitlines()[-1].startswith(f"{store}: Qwen2ForCausalLM in bfloat16, ")

    assert main(["verify", str(store)]) == 0
    assert "all checksums match" in capsys.readouterr().err

    block = Manifest.load(store).blocks[3]
    with open(store / block.file, "r+b") as file:
        file.seek(block.offset)
        byte = file.read(1)[0]
        file.seek(block.offset)
        file.write(bytes([byte ^ 1]))
    assert main(["verify", str(store)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("pipo: error: block store ")
    assert block.name in last
    assert block.file in last

    assert main(["verify", str(source)]) == 2
    assert "is a checkpoint, not a block store" in capsys.readouterr().err
    with pytest.raises(StoreError, match="another checkpoint, version or precision"):
        pack_store(source, store, dtype="float32")


# --- chosen by measurement -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("packed_in_this_process")
def test_a_policy_is_chosen_once_and_given_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    file = tmp_path / "policy.json"
    (tmp_path / "text").write_text("A text like those that the model will see. " * 25)
    arguments = ["pack", str(checkpoint), str(tmp_path / "auto"), "--precision", "auto", "--max-loss", "5%"]
    assert main([*arguments, "--measure-on", str(tmp_path / "text"), "--save-policy", str(file)]) == 0
    said = capsys.readouterr().err
    assert "measuring which weights need their bits" in said
    assert "precision auto: " in said
    manifest = Manifest.load(tmp_path / "auto")
    policy = Precision.load(file)
    assert policy == Precision.from_json(manifest.extra[POLICY_KEY])
    assert policy.model is not None
    assert prepare_store(tmp_path / "auto", precision=str(file)).folder == tmp_path / "auto"
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a child process was started"))
    target = Target(max_loss=0.05)
    assert choose_precision(checkpoint, target, cache=cache_folder(), text=tmp_path / "text").policy == policy


@pytest.mark.parametrize("option", [[], ["--memory", "1GiB"]])
def test_measuring_for_a_policy_has_a_budget(
    option: list[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    jobs: list[list[str]] = []

    def run_job(arguments: list[str], on_progress: object) -> None:
        jobs.append(arguments)
        raise InputError("enough")

    monkeypatch.setattr("pipo_ray.auto_precision.run_job", run_job)
    monkeypatch.setattr("pipo_ray.budgets.available_memory", lambda: 10 << 30)
    arguments = ["pack", str(checkpoint), str(tmp_path / "store"), "--precision", "auto", "--max-loss", "7%"]
    assert main([*arguments, *option]) == 2
    with pytest.raises(InputError, match="enough"):
        prepare_store(checkpoint, precision="auto", target=Target(max_loss=0.07), memory=5 << 30)
    given = [one for job in jobs for one in job if one.startswith("--memory")]
    assert given == [f"--memory={(1 << 30) if option else (15 << 29)}", f"--memory={5 << 30}"]
    assert main(["pack", str(checkpoint), str(tmp_path / "store"), "--memory", "1GiB"]) == 2
    assert "--memory is for --calibrate and --precision auto" in capsys.readouterr().err


@pytest.mark.usefixtures("no_child")
def test_what_a_policy_cannot_be_chosen_for(
    prepared: PreparedStore, checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    target = Target(max_loss=0.01)
    with pytest.raises(InputError, match="is packed already, and what its weights were is not known"):
        prepare_store(prepared.folder, precision="auto", target=target)
    with pytest.raises(InputError, match="--dtype float32 with --precision auto"):
        prepare_store(checkpoint, dtype="float32", precision="auto", target=target)
    with pytest.raises(InputError, match=r"calibration text .*nowhere cannot be read"):
        choose_precision(checkpoint, target, cache=tmp_path, text=tmp_path / "nowhere")
    arguments = ["pack", str(checkpoint), str(tmp_path / "store")]
    assert main([*arguments, "--precision", "int8", "--measure-on", "text"]) == 2
    assert "--measure-on is the text for --precision auto" in capsys.readouterr().err
    assert main([*arguments, "--precision", "auto", "--max-loss", "1%", "--save-policy", str(tmp_path)]) == 2
    assert f"--save-policy {tmp_path} is a folder" in capsys.readouterr().err
