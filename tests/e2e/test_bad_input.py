"""What bad input gets, from a real `pipo` process: one line that names the thing, the value and the way out, status 2.

| the contract's item | here | in detail |
|---|---|---|
| missing or unreadable folder, a path that does not exist | test_the_model | store/test_checkpoint, cli/test_prepare |
| config without weights, pickles, no config | test_the_model | store/test_checkpoint |
| a shard missing, truncated | test_the_model | store/test_checkpoint, store/test_safetensors_file |
| a header that lies | test_a_header_that_lies | store/test_safetensors_file |
| NaN, wrong dtype | test_the_weights | store/test_source |
| unknown architecture | test_the_weights | model/test_graph, model/test_probe, cli/test_prepare |
| encoder-decoder, quantized checkpoint | test_the_config | model/test_graph, quant/foreign/test_models |
| a store of a newer format, truncated, not finished | test_the_store | store/test_manifest, cli/test_prepare |
| a checksum that does not match | test_a_flipped_byte | store/test_verify, pipeline/test_checksums |
| disk full while packing | test_a_small_disk, test_a_disk_that_fills_up | store/test_pack |
| /dev/shm too small | test_a_small_dev_shm | session/test_ray_node |
| memory lower than needed, the least that would do | test_too_little_memory, test_the_least_works | plan/test_budget |
| a prompt longer than the context | test_the_second_prompt_is_bad | cli/test_run_real, model/test_text |
| empty prompt, prompt files | test_the_command_line | cli/test_prompts |
| bad sampling values | test_the_command_line | test_params, cli/test_run |
| CUDA asked for and absent, --gpu-memory on the CPU | test_without_a_gpu | |
| another Ray cluster | test_another_cluster | session/test_ray_node |
| unknown hub id without a network | cli/test_prepare | cli/test_download |
| --dtype, --trace, --ray-address | test_the_command_line | cli/test_run |
| bits, groups, policies that are unknown or of another model | test_few_bits | quant/test_formats, quant/test_policy |
| a calibration text that is too short | test_a_calibration_text_that_is_too_short | quant/test_calibration_text |
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from forked import Forked

from pipo_ray.store.manifest import Manifest

PIPO = (sys.executable, "-m", "pipo_ray.cli")
FOREIGN = Path(__file__).parent.parent / "session" / "foreign_cluster.py"
BUDGET = ("--memory", "2GiB", "--device", "cpu", "--ray-address", "local", "--max-tokens", "3")
IDS = ("--prompt-ids", "5,6,7")
AS_PIPO = """
import runpy, sys
sys.argv[1:] = {arguments!r}
try:
    runpy.run_module("pipo_ray.cli", run_name="__main__")
finally:
    assert not {{"torch", "transformers", "ray"}} & sys.modules.keys()
"""
"""As `python -m pipo_ray.cli` has it."""
PROGRESS = ("looking at the model", "packing", "verifying", "starting Ray", "memory budget ", "of it: ", "model ")


def pipo(*arguments: str, within: Sequence[str] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*within, *PIPO, *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200, env=os.environ | environment,
    )  # fmt: skip


def refused(*arguments: str, within: Sequence[str] = (), **environment: str) -> str:
    """Run it; it must end with status 2 and one line that says why, and leave no process. Returns that line."""
    done = pipo(*arguments, within=within, **environment)
    *before, line = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert line.startswith("pipo: error: ")
    assert all(one.startswith(PROGRESS) for one in before), done.stderr
    assert "Error:" not in line
    deadline = time.monotonic() + 10
    while (left := session_processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    return line.removeprefix("pipo: error: ")


AtOnce = Callable[..., str]


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AtOnce]:
    """`refused`, and before torch or Ray is loaded: there is nothing but the line. Forked from a process that has
    imported what `pipo run` does.
    """
    with Forked("import pipo_ray.cli.main, pipo_ray.llm, pipo_ray.prepare", tmp_path_factory.mktemp("pipo")) as forked:

        def at_once(*arguments: str) -> str:
            done = forked.run(AS_PIPO.format(arguments=list(arguments)))
            assert done.returncode == 2, done.stderr
            assert done.stdout == ""
            assert done.stderr.count("\n") == 1
            assert done.stderr.startswith("pipo: error: ")
            return done.stderr.removeprefix("pipo: error: ").strip()

        yield at_once


def session_processes() -> list[str]:
    """Processes of sessions that this test run started."""
    marker = f"PIPO_TEST_RUN={os.environ['PIPO_TEST_RUN']}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            environ = entry.read_bytes()
        except OSError:
            continue
        if marker in environ and b"PIPO_SESSION=" in environ:
            found.append(entry.parent.name)
    return found


def with_tmpfs(folder: Path | str, size: str) -> tuple[str, ...]:
    """In front of a command: `folder` is a small file system of its own, for this command alone."""
    script = f'mount -t tmpfs -o size={size} tmpfs "$0" && exec "$@"'
    command = ("unshare", "--mount", "sh", "-c", script, str(folder))
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    return command


@pytest.fixture(scope="module")
def sound(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("LlamaConfig", max_position_embeddings=64)


@pytest.fixture(scope="module")
def sharded(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("LlamaConfig", max_position_embeddings=64, max_shard_size="200KB")


@pytest.fixture(scope="module")
def packed(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store") / "sound"
    assert pipo("pack", str(sound), str(store)).returncode == 0
    return store


@pytest.fixture
def checkpoint(sound: Path, tmp_path: Path) -> Path:
    """One to damage."""
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


@pytest.fixture
def store(packed: Path, tmp_path: Path) -> Path:
    """One to damage."""
    return Path(shutil.copytree(packed, tmp_path / "store"))


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["-p", ""], ["-p", "empty", "give"]),
        (["-p", "x", "-p", ""], ["-p", "empty"]),
        (["--prompt-ids", ""], ["--prompt-ids", "empty", "1,2,3"]),
        ([], ["no prompt", "-p TEXT"]),
        (["--prompts", "nowhere.txt"], ["--prompts nowhere.txt", "No such file"]),
        (["--prompts", "bad.jsonl"], ["bad.jsonl, line 2", "not JSON", '{"prompt": "..."}']),
        ([*IDS, "--temperature", "-1"], ["temperature=-1.0", "0 or above"]),
        ([*IDS, "--top-p", "nan"], ["top_p=nan", "at most 1"]),
        ([*IDS, "--max-tokens", "0"], ["max_tokens=0", "1 or above"]),
        ([*IDS, "--dtype", "int3"], ["--dtype", "'int3'", "bfloat16"]),
        ([*IDS, "--trace", "nowhere/trace.json"], ["--trace nowhere/trace.json", "no folder"]),
        ([*IDS, "--trace", "."], ["--trace", "is a folder"]),
        ([*IDS, "--memory", "lots"], ["--memory", "'lots'", "3GiB"]),
        ([*IDS, "--memory", "900TiB"], ["--memory 900.0 TiB", "this machine has", "lower it"]),
        ([*IDS, "--ray-address", "127.0.0.1:1"], ["--ray-address 127.0.0.1:1", "nothing listens", "ray start"]),
        (["-p", "x"], ["no tokenizer", "--prompt-ids"]),
    ],
)
def test_the_command_line(sound: Path, tmp_path: Path, arguments: list[str], words: list[str], at_once: AtOnce) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt_token_ids": [1]}\n{oops\n')
    places = {name: str(tmp_path / name) for name in ("nowhere.txt", "bad.jsonl")}
    line = at_once("run", str(sound), *(places.get(one, one) for one in arguments))
    for word in words:
        assert places.get(word.rpartition(" ")[2], word) in line


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--precision", "int5"], ["precision 'int5' has 5 bits", "supported are 4 and 8"]),
        (["--precision", "int4-g48"], ["precision 'int4-g48' has groups of 48 columns", "supported are 32, 64, 128"]),
        (["--precision", "int8-g64"], ["precision 'int8-g64'", "one scale per row", "write int8"]),
        (["--precision", "nowhere.json"], ["precision policy nowhere.json cannot be read", "check the path"]),
        (["--precision", "bad.json"], ["precision policy bad.json is not JSON"]),
        (["--precision", "foreign.json"], ["foreign.json was made for", "--precision auto"]),
        (["--precision", "auto"], ["--max-loss", "--max-size"]),
        (["--precision", "int4", "--max-loss", "1%"], ["--max-loss", "--precision auto"]),
        (["--kv-precision", "5"], ["--kv-precision", "5", "8", "4"]),
    ],
)
def test_few_bits(sound: Path, tmp_path: Path, arguments: list[str], words: list[str], at_once: AtOnce) -> None:
    model = {"architecture": "GPT2", "layers": 2, "tensors": "0" * 32}
    (tmp_path / "bad.json").write_text("{oops")
    (tmp_path / "foreign.json").write_text(json.dumps({"rules": [["*", "int4"]], "model": model}))
    given = (str(tmp_path / one) if one.endswith(".json") else one for one in arguments)
    line = at_once("run", str(sound), *IDS, *given)
    for word in words:
        assert word in line.replace(f"{tmp_path}/", "")


def test_a_calibration_text_that_is_too_short(tmp_path: Path) -> None:
    text, store = tmp_path / "short.txt", tmp_path / "store"
    text.write_text("Too short.")
    bundled = Path(__file__).parents[2] / "pipo_ray" / "bundled"
    line = refused("pack", str(bundled), str(store), "--precision", "int4", "--calibrate", str(text))
    assert "short.txt" in line
    assert "at least" in line
    assert not store.exists()


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU")
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--device", "cuda"], ["cuda", "no NVIDIA device", "--device cpu"]),
        (["--gpu-memory", "1GiB"], ["--gpu-memory", "on the CPU", "leave it out"]),
        (["--gpu-memory", "1GiB", "--device", "cpu"], ["--gpu-memory", "--device cpu", "leave one of them out"]),
    ],
)
def test_without_a_gpu(sound: Path, arguments: list[str], words: list[str], at_once: AtOnce) -> None:
    line = at_once("run", str(sound), *IDS, *arguments)
    for word in words:
        assert word in line


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage, words",
    [
        ("gone", ["no such folder", "give a checkpoint folder"]),
        ("a file", ["a file, not a folder", "config.json"]),
        ("empty", ["no config.json", "check the path"]),
        ("no weights", ["no weights", "model.safetensors", "download"]),
        ("pickle", ["pytorch_model.bin", "executes code", "save_pretrained"]),
        ("truncated", ["model.safetensors", "truncated", "download"]),
        ("not JSON", ["config.json", "not JSON", "download"]),
        ("unreadable", ["config.json", "cannot be read", "check path and rights"]),
    ],
)
def test_the_model(checkpoint: Path, damage: str, words: list[str], at_once: AtOnce) -> None:
    weights = checkpoint / "model.safetensors"
    match damage:
        case "gone":
            shutil.rmtree(checkpoint)
        case "a file":
            shutil.rmtree(checkpoint)
            checkpoint.write_text("")
        case "empty":
            shutil.rmtree(checkpoint)
            checkpoint.mkdir()
        case "no weights":
            weights.unlink()
        case "pickle":
            weights.rename(checkpoint / "pytorch_model.bin")
        case "truncated":
            os.truncate(weights, weights.stat().st_size - 1000)
        case "not JSON":
            (checkpoint / "config.json").write_text("{")
        case "unreadable":  # for root, too
            (checkpoint / "config.json").unlink()
            (checkpoint / "config.json").mkdir()
    line = at_once("run", str(checkpoint), *IDS)
    for word in (str(checkpoint), *words):
        assert word in line


def test_a_shard_is_missing(sharded: Path, tmp_path: Path, at_once: AtOnce) -> None:
    copy = Path(shutil.copytree(sharded, tmp_path / "checkpoint"))
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.unlink()
    line = at_once("run", str(copy), *IDS)
    assert f"shard {shard.name} is missing" in line
    assert "download it" in line


def rewrite(path: Path, edit: Callable[[dict[str, Any], bytearray], None], length: int | None = None) -> None:
    """Edit header and data of a safetensors file, whatever comes out."""
    raw = path.read_bytes()
    (size,) = struct.unpack_from("<Q", raw)
    header, data = json.loads(raw[8 : 8 + size]), bytearray(raw[8 + size :])
    edit(header, data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


UP, GATE = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))


@pytest.mark.parametrize(
    "field, value, length, words",
    [
        ("data_offsets", "another's", None, [UP, GATE, "overlapping"]),
        ("data_offsets", [-4, 0], None, [UP, "bytes -4 to 0", "negative"]),
        ("shape", [-128, -64], None, [UP, "[-128, -64]"]),
        ("dtype", "X9", None, [UP, "'X9'", "known are"]),
        ("dtype", "F32", 1 << 62, [f"{1 << 62} bytes", "the format allows"]),
    ],
)
def test_a_header_that_lies(
    checkpoint: Path, field: str, value: Any, length: int | None, words: list[str], at_once: AtOnce
) -> None:
    def edit(header: dict[str, Any], data: bytearray) -> None:
        header[UP][field] = header[GATE][field] if value == "another's" else value

    rewrite(checkpoint / "model.safetensors", edit, length)
    line = at_once("run", str(checkpoint), *IDS)
    for word in (str(checkpoint / "model.safetensors"), *words, "download"):
        assert word in line


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, ["t5 is an encoder-decoder", "decoder-only"]),
        ({"quantization_config": {"quant_method": "hqq"}}, ["'hqq' cannot be read", "GPTQ, AWQ", "give a checkpoint"]),
        ({"model_type": None}, ["no model_type", "give"]),
    ],
)
def test_the_config(checkpoint: Path, entries: dict[str, Any], words: list[str], at_once: AtOnce) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    line = at_once("run", str(checkpoint), *IDS)
    for word in (str(path), *words):
        assert word in line


SLOW = pytest.mark.slow  # several seconds each, and known from elsewhere: torch is imported, Ray is started


@pytest.mark.parametrize("damage", ["NaN", pytest.param("dtype", marks=SLOW), pytest.param("architecture", marks=SLOW)])
def test_the_weights(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    def edit(header: dict[str, Any], data: bytearray) -> None:
        if damage == "dtype":
            header[UP]["dtype"] = "I32"
        elif damage == "NaN":
            struct.pack_into("<f", data, header[UP]["data_offsets"][0] + 400, float("nan"))

    rewrite(checkpoint / "model.safetensors", edit)
    words = {
        "NaN": [UP, "model.safetensors", "NaN", "1 of ", "download"],
        "dtype": [UP, "I32", "BF16, F16, F32"],
        "architecture": ["config.json", "'nosuch'", "newer transformers"],
    }
    if damage == "architecture":
        path = checkpoint / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "nosuch"}))
    line = refused("pack", str(checkpoint), str(tmp_path / "new"))
    for word in words[damage]:
        assert word in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


# --- the block store -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "verify"])
@pytest.mark.parametrize(
    "damage, words",
    [
        ("newer", ["format version 99", "update pipo_ray"]),
        ("truncated", ["blocks-00001-of-00001.safetensors", "truncated", "pack the checkpoint again"]),
        ("no config", ["no config.json", "pack the checkpoint again"]),
        ("file gone", ["blocks-00001-of-00001.safetensors", "No such file", "pack the checkpoint again"]),
    ],
)
def test_the_store(store: Path, command: str, damage: str, words: list[str], at_once: AtOnce) -> None:
    (file,) = store.glob("*.safetensors")
    match damage:
        case "newer":
            manifest = store / "manifest.json"
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 99}))
        case "truncated":
            os.truncate(file, file.stat().st_size - 5000)
        case "file gone":
            file.unlink()
        case "no config":
            if command == "verify":
                pytest.skip("its checksums are what they were")
            (store / "config.json").unlink()
    line = at_once(command, str(store), *(IDS if command == "run" else ()))
    for word in (str(store), *words):
        assert word in line


@pytest.mark.parametrize(
    "place, weight_memory",
    [
        pytest.param("layers.2.mlp", "100KiB", marks=SLOW),  # in CI by a drive that flips a bit
        ("embedding", "100KiB"),
        pytest.param("layers.2.mlp", "4MiB", marks=SLOW),
    ],
)
def test_a_flipped_byte(store: Path, place: str, weight_memory: str) -> None:
    """In what is streamed (in CI: test_first_reads.py), in what is resident, and in the table of which only rows are
    read.
    """
    block = next(block for block in Manifest.load(store).blocks if block.name.startswith(place))
    with open(store / block.file, "r+b") as file:
        file.seek(block.offset + block.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    verified = refused("verify", str(store))
    ran = refused("run", str(store), *IDS, *BUDGET, "--weight-memory", weight_memory)
    for line in (verified, ran):
        for word in (block.name, block.file, str(store), "checksum", block.checksum, "pack the checkpoint again"):
            assert word in line


# --- the machine -----------------------------------------------------------------------------------------------------


def test_a_small_disk(sound: Path, tmp_path: Path) -> None:
    line = refused("run", str(sound), *IDS, within=with_tmpfs(tmp_path, "1m"), PIPO_CACHE=str(tmp_path))
    for word in (str(tmp_path), "needs 8.7", "PIPO_CACHE"):
        assert word in line
    free = re.search(r" (\d+) KiB are free", line)
    assert free is not None
    assert 500 < int(free[1]) < 1024, "all but what is kept of transformers' models"


def test_a_disk_that_fills_up(sound: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for it: what was checked at the start no longer holds."""
    store = tmp_path / "store"
    line = refused("pack", str(sound), str(store), within=("sh", "-c", 'ulimit -f 400; exec "$0" "$@"'))
    for word in (str(store), "disk full while packing", "still to be written", "free some"):
        assert word in line
    assert not store.exists()


def test_a_small_dev_shm(packed: Path) -> None:
    line = refused("run", str(packed), *IDS, *BUDGET, within=with_tmpfs("/dev/shm", "20m"))
    for word in ("75.0 MiB of /dev/shm", "20.0 MiB are free", "--weight-memory", "remount,size="):
        assert word in line


TOO_LITTLE = [("--memory", "100MiB", "processes 760.0 MiB"), ("--weight-memory", "1KiB", "largest matrix part")]


@pytest.mark.parametrize("option, value, taker", TOO_LITTLE)
def test_too_little_memory(packed: Path, option: str, value: str, taker: str, at_once: AtOnce) -> None:
    line = at_once("run", str(packed), *IDS, *BUDGET, option, value)
    assert line.startswith(f"{option} {value[:-3]}.0 {value[-3:]} is too low: at least ")
    assert taker in line


@pytest.mark.slow
@pytest.mark.parametrize("option, value, taker", TOO_LITTLE)
def test_the_least_works(packed: Path, option: str, value: str, taker: str, at_once: AtOnce) -> None:
    line = at_once("run", str(packed), *IDS, *BUDGET, option, value)
    least = re.search(r"at least (\S+ \S+) would do", line)
    assert least is not None
    done = pipo("run", str(packed), *IDS, *BUDGET, option, least[1])
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3


def test_the_second_prompt_is_bad(packed: Path, at_once: AtOnce) -> None:
    long = ",".join(["5"] * 64)
    line = at_once("run", str(packed), *IDS, "--prompt-ids", long, *BUDGET)
    assert line == (
        "prompt 2 (of 2) of 64 tokens leaves no room for an answer: the context is 64 tokens; shorten the prompt to at "
        "most 63 tokens"
    )


def test_an_id_that_the_model_does_not_have(packed: Path, at_once: AtOnce) -> None:
    line = at_once("run", str(packed), *IDS, "--prompt-ids", "5,256", *BUDGET)
    assert line == (
        "prompt 2 (of 2): prompt token 1 is 256: the model's token ids go from 0 to 255; correct the prompt"
    )


# --- another Ray cluster ---------------------------------------------------------------------------------------------


@pytest.fixture
def foreign() -> Iterator[tuple[str, int]]:
    """Somebody else's cluster: its address and the pid of its raylet's parent."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    child = subprocess.Popen(
        [sys.executable, str(FOREIGN), folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    yield child.stdout.readline().strip(), child.pid
    child.communicate("", timeout=30)
    shutil.rmtree(folder, ignore_errors=True)


def processes_below(pid: int) -> set[str]:
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return set(done.stdout.split())


@pytest.mark.slow  # `session/test_ray_node.py` has the refusal in a process
def test_another_cluster(packed: Path, foreign: tuple[str, int], at_once: AtOnce) -> None:
    address, pid = foreign
    before = processes_below(pid)
    assert before
    alone = ("--memory", "2GiB", "--device", "cpu", "--max-tokens", "3")
    line = at_once("run", str(packed), *IDS, *alone)
    for word in ("another Ray cluster", "--ray-address auto", "--ray-address local"):
        assert word in line
    # RAY_ADDRESS tells "auto" which one, in case there is a third.
    done = pipo("run", str(packed), *IDS, *alone, "--ray-address", "auto", RAY_ADDRESS=address)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3
    assert not session_processes()
    assert processes_below(pid) == before
