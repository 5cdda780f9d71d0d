"""LLM: the Python API, in the conventions that vLLM's users know."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from pipo_ray.assembly import RequestAssembly
from pipo_ray.budgets import Size, gpu_budget, kv_on_disk_wish, memory_budget, require_one_place
from pipo_ray.compiled.support import low_bit_support
from pipo_ray.device import choose_device
from pipo_ray.errors import ActorFailedError, InputError, PipoError, ResourceError
from pipo_ray.lengths import Lengths
from pipo_ray.messages import ComputeSetup, RequestSpec, TokenEvent
from pipo_ray.outputs import RequestOutput
from pipo_ray.params import SamplingParams
from pipo_ray.pipeline.polite_drive import cannot_give_way
from pipo_ray.pipeline.tracing import merge_traces
from pipo_ray.plan.budget import plan_run
from pipo_ray.plan.kv_disk import KVOnDisk
from pipo_ray.plan.low_bit_pages import low_bit_kv
from pipo_ray.plan.tokenizer_memory import tokenizer_bytes
from pipo_ray.plan.transfer import Transfer, check_mode
from pipo_ray.planner import asks_for_rates, choose_plan, open_kv_place
from pipo_ray.prepare import cache_folder, code_folder, prepare_store, profile_folder
from pipo_ray.prompts import Prompt, check_token_ids, list_params, list_prompts, name_prompt
from pipo_ray.quant.kv_policy import KVPrecision
from pipo_ray.quant.target import Target
from pipo_ray.scheduling.limits import limits_of
from pipo_ray.session.background import give_way
from pipo_ray.session.memory import parse_size
from pipo_ray.session.peak import PeakSampler
from pipo_ray.session.ray_node import check_address
from pipo_ray.session.session import Session
from pipo_ray.session.worker_environment import num_threads, worker_environment
from pipo_ray.stage import Stage, store_bytes

OnProgress = Callable[[str, int, int], None]

_POLL_S = 1.0
_LOST_PATIENCE_S = 60.0


class LLM:
    """A model that runs on this machine through the four actors. A context manager: leaving it stops what it started,
    and only that.

    `model` is a checkpoint folder, a block store or a hub id. `memory` is everything the program may take from RAM,
    `weight_memory` slots and resident pieces alone, `gpu_memory` what it may take on the GPU; each in bytes or like
    "3GiB". `precision` is that of the weights: "int4", "int8", "16bit" or others (`quant/policy.py`), or "auto" with
    `max_loss`, of perplexity ("1%"), or `max_size`, of the weights, as its target (`quant/target.py`). `device`
    is "auto", "cpu" or "cuda"; `dtype` "auto", "bfloat16", "float16" or "float32". `ray_address`: None
    starts a private Ray (an error if another runs on this machine), "local" starts one in any case, "auto" or
    "host:port" joins. `trace` is a file for a Chrome/Perfetto trace, written on `close`. `max_model_len` bounds prompt
    plus answer in tokens, `max_batch_tokens` the tokens that a sweep computes. `on_progress(phase, done, total)` hears
    of packing, and with phase "start" when Ray and the actors start. `before_start(llm)` is called before that, when
    model and budgets are known: `check_prompts` works then, and what it raises ends the construction. With `background`
    Ray and the actors have the lowest priority, and reading pauses while others use the disk; the calling process keeps
    its priority. `verify_checksums` checks what is in memory of every block the first time it is read.
    `mode` is "performance" or "memory-saver", which stages weights in a quarter of the memory; `max_kv_tokens` the most
    tokens that all requests at the same time will have, and `max_kv_sequences` how many sequences they are: what those
    do not need is left to weights, and what comes beyond them waits (8 always go together, and tokens whose logits
    `score` gives); `transfer` takes the place of what would be chosen from a short measurement of the drive (made once,
    and kept in the cache).
    `kv_in_ram` keeps in RAM what the GPU has no room for of the KV cache; with `kv_on_cpu` all of it is there, and
    the processor attends for tokens that come alone, so that the link has weights to carry only (None: where that is
    faster by 5 % and more, for what `max_kv_tokens` says); `kv_on_disk`
    ("8GiB", "auto") on the drive what RAM has none for, in the cache folder, encrypted (a `plan.kv_disk.KVOnDisk`
    for another folder, or without). `prefix_cache` keeps the KV of what has ended, as long as there is room, for
    requests that begin with the same tokens. `calibrate` rounds int4 weights for the inputs that a text gives them:
    True for the bundled text, or a text file. `kv_precision`
    holds the KV cache in 16, 8 or 4 bits, or per layer as a file says (`quant/kv_policy.py`).

    Raises PipoError: whatever is wrong with model, budgets or machine is said in one line. A DriveError ends the
    requests that run, and the next one tries again. A drive that does not answer is a warning of the log "pipo_ray".
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        memory: Size = None,
        weight_memory: Size = None,
        gpu_memory: Size = None,
        device: str = "auto",
        dtype: str = "auto",
        precision: str | None = None,
        max_loss: str | float | None = None,
        max_size: Size = None,
        ray_address: str | None = None,
        trace: str | os.PathLike[str] | None = None,
        max_model_len: int | None = None,
        max_batch_tokens: int | None = None,
        on_progress: OnProgress | None = None,
        dashboard: bool = False,
        verify_checksums: bool = True,
        before_start: Callable[[LLM], None] | None = None,
        background: bool = False,
        mode: str = "performance",
        max_kv_tokens: int | None = None,
        transfer: Transfer | None = None,
        kv_in_ram: bool = False,
        kv_on_disk: Size | KVOnDisk = None,
        prefix_cache: bool = True,
        calibrate: bool | str | os.PathLike[str] = False,
        kv_precision: str | int = 16,
        max_kv_sequences: int | None = None,
        kv_on_cpu: bool | None = None,
    ) -> None:
        self._stack = contextlib.ExitStack()
        self._trace = None if trace is None else Path(trace)
        self._client = uuid.uuid4().hex[:8]
        self._numbers = itertools.count()
        self._requests: dict[str, RequestAssembly] = {}
        self._scheduler, self._acknowledged = "", 0  # whose events we follow, and the number of the last one taken
        self._news, self._polling = threading.Condition(), False
        self._sweeps_before = self._bytes_before = self._sweeps = self._bytes = 0
        self._started_s = time.perf_counter()
        counts = {
            "max_batch_tokens": max_batch_tokens,
            "max_model_len": max_model_len,
            "max_kv_tokens": max_kv_tokens,
            "max_kv_sequences": max_kv_sequences,
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise InputError(f"{name} {count} is below 1")
        chosen_mode = check_mode(mode)
        chosen_kv = KVPrecision.parse(kv_precision)
        require_one_place(kv_in_ram=kv_in_ram, kv_on_disk=kv_on_disk is not None, kv_on_cpu=bool(kv_on_cpu))
        if self._trace is not None and not self._trace.absolute().parent.is_dir():
            raise InputError(f"trace file {self._trace}: the folder {self._trace.absolute().parent} does not exist")
        elsewhere = kv_on_cpu is not None or kv_in_ram or kv_on_disk is not None
        asks = asks_for_rates(tokens=max_kv_tokens, elsewhere=elsewhere)
        chosen = choose_device(device, profile_folder() if asks else None)
        budget, budget_line = memory_budget(memory)
        weights = None if weight_memory is None else parse_size(weight_memory, "--weight-memory")
        self._gpu_memory = gpu_budget(gpu_memory, chosen)
        check_address(ray_address)  # now, and not after an hour of packing
        on_disk = kv_on_disk_wish(kv_on_disk, cache_folder)
        prepared = prepare_store(
            model, dtype=dtype, precision=precision, target=Target.parse(precision, max_loss, max_size),
            on_progress=on_progress, calibrate=calibrate, memory=budget,
        )  # fmt: skip
        self._facts = prepared.facts
        few_bits = low_bit_kv(chosen_kv, self._facts)
        plan = partial(
            plan_run, prepared.manifest, self._facts, memory_bytes=budget, weight_memory_bytes=weights,
            gpu_memory_bytes=self._gpu_memory, gpu_context_bytes=chosen.context_bytes,
            max_batch_tokens=max_batch_tokens, max_model_len=max_model_len, max_kv_tokens=max_kv_tokens,
            kv_in_ram=kv_in_ram, kv_on_disk=on_disk, low_bit_kv=few_bits,
            max_kv_sequences=max_kv_sequences,
            tokenizer_bytes=tokenizer_bytes(prepared.folder, self._facts.vocab_size),
        )  # fmt: skip
        folders = prepared.manifest.folders(prepared.folder)
        kv_place = open_kv_place(
            chosen, self._facts, few_bits, tokens=max_kv_tokens, precision=prepared.manifest.precision,
            elsewhere=elsewhere,
        )  # fmt: skip
        self._plan, reasons = choose_plan(
            plan, folders, cache_folder(), chosen, chosen_mode,
            transfer=transfer, kv_on_cpu=bool(kv_on_cpu), kv_place=kv_place, on_progress=on_progress,
        )  # fmt: skip
        processor = low_bit_support() if chosen.kind == "cpu" else ()
        self._lines = [budget_line, *prepared.describe(*processor), *self._plan.explanation, *reasons]
        if background:
            self._lines += cannot_give_way(folders)
        if self._facts.probe_reason:
            self._lines.append(self._facts.probe_reason)
        limits = limits_of(self._plan, self._facts, prefix_cache=prefix_cache)
        self._lengths = Lengths(self._facts, self._plan, limits, max_model_len)
        if before_start is not None:
            before_start(self)
        if on_progress is not None:
            on_progress("start", 0, 0)
        try:
            session = Session(
                object_store_bytes=store_bytes(self._plan), address=ray_address, dashboard=dashboard,
                worker_environment=worker_environment(self._plan.sweep.num_matrix_shapes),
                preload=("pipo_ray.actors.calls",),
            )  # fmt: skip
            self._stack.callback(session.close)
            self._session = session
            if background:
                give_way(session.node.pids())  # the actors are started by one of them
            self._peak = PeakSampler(session.pids)
            self._peak.start()
            self._stack.callback(self._peak.stop)
            self._stage = Stage(
                session, prepared.folder, self._plan,
                ComputeSetup(
                    self._facts, chosen.kind, prepared.manifest.precision, num_threads(), self._gpu_memory,
                    chosen.context_bytes, str(Path(session.path) / "kernels.json"),
                    str(profile_folder()), str(code_folder()), self._plan.kv,
                    self._plan.kv_tokens, None if self._plan.low_bit_kv is None else self._plan.low_bit_kv.bits,
                    self._plan.kv_on_cpu, self._plan.tables_in_ram, self._plan.graph_bytes,
                ),
                limits,
                trace=self._trace is not None, verify_checksums=verify_checksums,
                background=background,
            )  # fmt: skip
            self._stack.callback(self._stage.close)
            if self._trace is not None:
                self._stack.callback(self._write_trace)
            self._stage.wait_until_ready()
            self._lines += self._stage.notes()
            if background:
                give_way(session.node.pids())  # on a cluster that was joined, the actors
        except BaseException:
            self.close()
            raise

    # -- generating
    # -------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete `prompts` (one, or a list: a string, a list of token ids, or {"prompt_token_ids": [...]}) and return
        their outputs in order.
        """
        last: dict[str, RequestOutput] = {}
        identifiers = self._submit(prompts, sampling_params)
        for output in self._follow(identifiers):
            last[output.request_id] = output
        return [last[identifier] for identifier in identifiers]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Like `generate`, but yields a request's output, all of it so far, each time there is more of it."""
        return self._follow(self._submit(prompts, sampling_params))

    def chat(
        self, messages: Sequence[Mapping[str, Any]], sampling_params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """Answer a conversation ([{"role": ..., "content": ...}, ...]) in the checkpoint's chat template."""
        return self.generate(self._chat_prompt(messages), sampling_params)

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Like `chat`, yielding the answer as it grows."""
        return self.stream(self._chat_prompt(messages), sampling_params)

    def score(self, prompts: Prompt | Sequence[Prompt]) -> list[npt.NDArray[np.float32]]:
        """Logits [tokens, vocabulary] of every position of each prompt: for perplexity and for comparisons."""
        identifiers = self._submit(prompts, SamplingParams(max_tokens=1, temperature=0.0), score=True)
        requests = [self._requests[identifier] for identifier in identifiers]
        for _ in self._follow(identifiers):
            pass
        return [np.concatenate(request.logits) for request in requests]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of `text`, as a prompt would have them. Raises InputError without a tokenizer."""
        prompt = {"prompt": text, "add_special_tokens": add_special_tokens}
        ((ids, _),) = self._stage.call(self._stage.compute_worker, "encode", [prompt])
        return list(ids)

    def check_prompts(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> None:
        """Raise InputError for prompts of token ids that this model or this budget cannot serve; asks no actor. Text is
        not looked at: the tokenizer is the compute worker's.
        """
        listed = list_prompts(prompts)
        for number, (prompt, one) in enumerate(zip(listed, list_params(sampling_params, len(listed)), strict=True), 1):
            ids = check_token_ids(prompt, number, len(listed), self._facts.vocab_size)
            if ids is not None:
                self._lengths.most_new_tokens(name_prompt(number, len(listed)), len(ids), one, score=False)

    def abort(self, request_id: str) -> None:
        """End a request; what it has generated stays in its last output, with finish reason "abort"."""
        if request_id in self._requests:
            self._call_scheduler("abort", self._client, [request_id])

    # -- about the run
    # ----------------------------------------------------------------------------------------------------

    def describe(self) -> list[str]:
        """Lines that say what the memory is spent on."""
        return list(self._lines)

    @property
    def vocab_size(self) -> int:
        """Numbers that a token's logits have."""
        return self._facts.vocab_size

    @property
    def max_model_len(self) -> int:
        """Prompt plus answer, in tokens, at most."""
        return self._lengths.longest

    def pids(self) -> dict[str, int]:
        """The actors' process ids by name."""
        return self._stage.pids()

    def report(self) -> dict[str, Any]:
        """What the run did so far; bytes and seconds. `stages` has per actor the shares of time busy, waiting (for the
        next one in line), paused (giving way to other programs) and starved (of work), which add up to 1; and `busy_s`,
        `waiting_s`, `paused_s` in seconds.
        """
        stages = []
        for times in self._stage.times():
            total = max(times.total_s, 1e-9)
            busy = min(1.0, times.busy_s / total)
            waiting = min(1.0 - busy, times.waiting_s / total)
            paused = min(1.0 - busy - waiting, times.paused_s / total)
            stages.append(
                {
                    "stage": times.stage,
                    "busy": busy,
                    "waiting": waiting,
                    "paused": paused,
                    "starved": 1.0 - busy - waiting - paused,
                    "busy_s": times.busy_s,
                    "waiting_s": times.waiting_s,
                    "paused_s": times.paused_s,
                    **times.details,
                }
            )
        return {
            "sweeps": self._sweeps_before + self._sweeps,
            "bytes_streamed": self._bytes_before + self._bytes,
            "peak_memory_bytes": self._peak.peak_bytes,
            "memory_budget_bytes": self._plan.memory_bytes,
            "weight_memory_bytes": self._plan.weight_bytes,
            "huge_page_bytes": self._stage.huge_page_bytes,
            "kv_ram_bytes": 0 if self._plan.kv is None else self._plan.kv.ram_bytes,
            "kv_disk_bytes": 0 if self._plan.kv_disk is None else self._plan.kv_disk.disk_bytes,
            "gpu_memory_bytes": self._gpu_memory,
            "model_bytes": self._plan.model_bytes,
            "resident_bytes": self._plan.resident_bytes,
            "streamed_bytes_per_sweep": self._plan.streamed_bytes_per_sweep,
            "kv_tokens": self._plan.kv_tokens,
            "elapsed_s": time.perf_counter() - self._started_s,
            "stages": stages,
        }

    def close(self) -> None:
        """Stop everything that was started. Calling it twice is harmless."""
        self._stack.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- inside
    # -----------------------------------------------------------------------------------------------------------

    def _chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        text = self._stage.call(self._stage.compute_worker, "render_chat", list(messages))
        # The template has put the special tokens there already.
        return {"prompt": text, "add_special_tokens": False}

    def _submit(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        score: bool = False,
    ) -> list[str]:
        listed = list_prompts(prompts)
        chosen = list_params(params, len(listed))
        encoded = self._stage.call(self._stage.compute_worker, "encode", listed)
        self._stage.call(self._stage.compute_worker, "check_params", chosen)
        specs, texts = [], []
        for number, ((token_ids, text), one) in enumerate(zip(encoded, chosen, strict=True), start=1):
            most = self._lengths.most_new_tokens(name_prompt(number, len(encoded)), len(token_ids), one, score)
            seed = one.seed if one.seed is not None else int.from_bytes(os.urandom(8), "little") >> 1
            identifier = str(next(self._numbers))
            specs.append(RequestSpec(identifier, tuple(token_ids), one, seed, most, score))
            texts.append(text)
        now = time.perf_counter()
        with self._news:
            for spec, text in zip(specs, texts, strict=True):
                self._requests[spec.request_id] = RequestAssembly(
                    spec, text, now, self._sweeps_before + self._sweeps, self._bytes_before + self._bytes
                )
            self._send(specs)
        return [spec.request_id for spec in specs]

    def _follow(self, identifiers: Sequence[str]) -> Iterator[RequestOutput]:
        requests = {identifier: self._requests[identifier] for identifier in identifiers}
        open_requests, shown = set(identifiers), dict.fromkeys(identifiers, 0)

        def changed() -> list[str]:
            return [one for one in identifiers if one in open_requests and requests[one].num_events > shown[one]]

        try:
            while open_requests:
                # What another iterator of this LLM has taken for us counts too.
                self._wait_for_news(lambda: bool(changed()))
                for identifier in changed():
                    if (error := requests[identifier].error) is not None:
                        self._stage.check()  # that an actor died for good is why the others failed
                        raise error
                    with self._news:
                        shown[identifier], output = requests[identifier].num_events, requests[identifier].output()
                    if output.finished:
                        open_requests.discard(identifier)
                    yield output
        finally:
            with contextlib.suppress(PipoError):
                for identifier in open_requests:
                    self.abort(identifier)
            for identifier in identifiers:
                self._requests.pop(identifier, None)

    def _wait_for_news(self, has_news: Callable[[], bool]) -> None:
        """Wait for events (a second at most) and take them, unless there is news already.

        Of several threads one asks the scheduler, and the others wait for what it brings.
        """
        with self._news:
            while self._polling and not has_news():
                self._news.wait()
            if has_news():
                return
            self._polling = True
            scheduler, acknowledged = self._scheduler, self._acknowledged
        try:
            events = self._call_scheduler("poll", self._client, scheduler, acknowledged, _POLL_S)
            with self._news:
                if events is None:
                    self._send([])
                elif (
                    scheduler == self._scheduler
                ):  # else another thread has found a new scheduler: what this one did is done again
                    self._take(events)
        finally:
            with self._news:
                self._polling = False
                self._news.notify_all()

    def _take(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            self._acknowledged = max(self._acknowledged, event.number)
            self._sweeps, self._bytes = event.sweeps, event.bytes_streamed
            request = self._requests.get(event.request_id)
            if request is not None:
                request.take(event, self._sweeps_before, self._bytes_before)

    def _send(self, specs: Sequence[RequestSpec]) -> None:
        """Hand `specs` to the scheduler. To a new one, which takes nothing at first, goes everything that is not
        finished, with what was generated.
        """
        while (scheduler := self._call_scheduler("submit", self._client, self._scheduler, specs)) != self._scheduler:
            self._scheduler, self._acknowledged = scheduler, 0
            self._sweeps_before, self._bytes_before = (
                self._sweeps_before + self._sweeps,
                self._bytes_before + self._bytes,
            )
            self._sweeps = self._bytes = 0
            specs = [request.resubmission() for request in self._requests.values() if not request.finished]

    def _call_scheduler(self, method: str, *arguments: Any) -> Any:
        return self._stage.call(self._stage.scheduler, method, *arguments, patience_s=_LOST_PATIENCE_S)

    def _write_trace(self) -> None:
        folder = self._stage.trace_folder
        if folder is not None and self._trace is not None:
            try:
                merge_traces(sorted(folder.glob("*.jsonl")), self._trace)
            except OSError as error:
                raise ResourceError(
                    f"trace file {self._trace} cannot be written: {error.strerror}; free some space, or choose another "
                    "file"
                ) from error


__all__ = ["LLM", "ActorFailedError"]
