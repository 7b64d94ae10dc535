"""The teacher on SGLang: its scheduler writes hidden states into the ring, see sglang_plugin.py.

This process takes requests and hands them to the engine, many at a time; no hidden state passes through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import inspect
import signal
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch

from kdflow.config import TeacherConfig
from kdflow.errors import ConfigError, EngineDied, PeerDied, TeacherFault
from kdflow.modeling import load_model_config, resolve_device, resolve_dtype
from kdflow.registry import nearest
from kdflow.teacher import sglang_plugin
from kdflow.teacher.base import TEACHERS, TeacherRings
from kdflow.teacher.sglang_options import TRIED, check_options, engine_options, installed_version, prepare_environment
from kdflow.teacher.sglang_plugin import Errand
from kdflow.tracing import OFF, Trace
from kdflow.transport import HiddenRing, PrefillRequest, ReadSlot, RequestRing, SleepOrder
from kdflow.types import Microbatch

T = TypeVar("T")

_TICK_S = 0.25
_CLOSE_S = 10.0
_IDLE_WAIT_S = 60.0


@TEACHERS.register("sglang")
class SGLangTeacher:
    """An engine of one or more GPUs; requests go in as they come, and it batches and chunks them as it likes."""

    @staticmethod
    def check(config: TeacherConfig, *, sleeps: bool = False) -> None:
        check_options(config, sleeps=sleeps)

    def __init__(self, config: TeacherConfig, *, gpu: int, sleeps: bool = False) -> None:
        self.check(config, sleeps=sleeps)
        self.device = resolve_device(config.device, gpu)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.hidden_size: int = load_model_config(config.model).get_text_config().hidden_size
        self._num_workers = config.num_workers
        self._requests: RequestRing | None = None
        self._rings: TeacherRings | None = None
        options = engine_options(config, self.device, self.dtype, sleeps=sleeps)
        prepare_environment(self.device, config.tp_size, sleeps=sleeps)
        on_term = signal.getsignal(signal.SIGTERM)
        self._engine: Any = _start_engine(options)
        self._loop: asyncio.AbstractEventLoop = self._engine.loop
        self._death: asyncio.Future[str] = self._loop.create_future()
        try:
            self._run(self._handshake(on_term))
        except BaseException:
            self.close()
            raise

    # --- the engine ---

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work` while the engine lives.

        Raises:
            EngineDied: a process of it ended.
        """

        async def watched() -> T:
            task = asyncio.ensure_future(work)
            watch = asyncio.ensure_future(self._watch())
            try:
                await asyncio.wait({task, self._death}, return_when=asyncio.FIRST_COMPLETED)
                if self._death.done() and not task.done():
                    raise EngineDied(self._death.result())
                return task.result()
            finally:
                watch.cancel()
                task.cancel()

        return self._loop.run_until_complete(watched())

    async def _watch(self) -> None:
        processes = _engine_processes()
        while not self._death.done():
            for process, name in processes.items():
                if _has_ended(process):
                    self._mourn(f"{name} (process {process.pid}) of the SGLang engine ended")
            await asyncio.sleep(_TICK_S)

    def _mourn(self, message: str) -> None:
        if not self._death.done():
            self._death.set_result(f"{message}; its own messages, if it left any, are above")

    async def _handshake(self, on_term: Any) -> None:
        """Proves that the plugin answers in the scheduler, and takes the signals back that SGLang took."""
        unanswered = await self._generate([np.zeros(1, np.int32)], [Errand(ring="")])
        self._loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, on_term)
        self._loop.add_signal_handler(signal.SIGQUIT, self._mourn, "a process of the SGLang engine reported an error")
        if unanswered:
            raise TeacherFault(
                f"SGLang {installed_version()} (tried: {', '.join(TRIED)}) runs without kdflow's plugin, which did "
                "not answer the first request. Its traceback is above if it failed to load; SGLANG_PLUGINS must not "
                f"leave {sglang_plugin.KEY} out; after an update of kdflow, install it again"
            )

    async def _generate(self, samples: Sequence[np.ndarray], errands: Sequence[Errand]) -> list[Any]:
        """Prefills; why the engine ended those requests for which the plugin did not answer."""
        try:
            replies = await self._engine.async_generate(
                input_ids=[sample.tolist() for sample in samples],
                # With no token to generate the engine neither samples nor begins to decode.
                sampling_params=[{"max_new_tokens": 0, "custom_params": errand.to_params()} for errand in errands],
                return_hidden_states=True,
            )
        except ValueError as refusal:
            raise TeacherFault(
                f"SGLang refuses a request: {refusal} Longer ones need a larger context_length, and max_total_tokens, "
                "in teacher.engine_args"
            ) from None
        told = [reply["meta_info"] for reply in replies]
        return [meta.get("finish_reason") for meta in told if sglang_plugin.KEY not in meta]

    async def _prefill(self, microbatch: Microbatch, errand: Errand) -> None:
        """Has the loss rows of a microbatch written into the slot that `errand` names."""
        if unanswered := await self._generate(*split(microbatch, errand)):
            raise TeacherFault(
                f"ticket {errand.ticket}: SGLang ended {len(unanswered)} requests without kdflow's plugin (finish "
                f"reason {unanswered[0]}); is another plugin in the way?"
            )

    # --- the teacher's side of the rings ---

    def attach(self, rings: TeacherRings) -> None:
        manager = self._engine.tokenizer_manager
        # Requests are shorter than this, and without the last token of a sample, of which no row enters the loss.
        longest = manager.max_req_input_len
        if rings.longest_sample > longest:
            context = manager.context_len + rings.longest_sample - longest
            raise ConfigError(
                f"data.max_length: with this teacher SGLang takes samples of {longest} tokens at most, got "
                f"{rings.longest_sample}; lower it, or in teacher.engine_args set context_length to {context} and keep "
                "the KV cache above that (max_total_tokens, mem_fraction_static)"
            )
        self._rings = rings
        self._requests = RequestRing.attach(rings.requests, role="consumer")

    def serve(self, *, limit: int | None, trace: Trace = OFF) -> SleepOrder | bool:
        assert self._requests is not None, "attach first"
        return self._run(self._serve(self._requests, limit, trace))

    async def _serve(self, requests: RequestRing, limit: int | None, trace: Trace) -> SleepOrder | bool:
        window = -(-requests.num_slots // self._num_workers)
        answering: set[asyncio.Task[None]] = set()
        num_taken = 0
        order: SleepOrder | None = None
        while True:
            may_take = order is None and len(answering) < window and (limit is None or num_taken < limit)
            try:
                message = requests.try_lease() if may_take else None
            except PeerDied:
                return False
            if message is not None:
                order = SleepOrder.of(message)
                if order is None:
                    answering.add(asyncio.ensure_future(self._answer(message)))
                    num_taken += 1
                continue
            if not answering and (order is not None or num_taken == limit):
                return order or True
            await self._wait(requests if may_take else None, answering)
            for task in [task for task in answering if task.done()]:
                answering.remove(task)
                task.result()
                trace.end_of_step()

    async def _wait(self, requests: RequestRing | None, answering: set[asyncio.Task[None]]) -> None:
        """Until an answer is done or a request may be there, a second at most."""
        news = self._loop.create_future()
        if requests is not None:
            self._loop.add_reader(requests.ready_fd(), lambda: news.done() or news.set_result(None))
        try:
            await asyncio.wait({news, *answering}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if requests is not None:
                self._loop.remove_reader(requests.ready_fd())

    async def _answer(self, message: ReadSlot) -> None:
        """The request stays in the ring until it is answered: should we die before, another worker finds it."""
        assert self._rings is not None
        request = PrefillRequest.decode(bytes(message.buffer()))
        ring = self._rings.hidden[request.rank]
        errand = self._errand(ring, self._rings.placement, rank=request.rank, ticket=request.ticket)
        await self._prefill(request.microbatch, errand)
        message.release()

    def _errand(self, ring: str, placement: str, *, rank: int, ticket: int) -> Errand:
        dtype = str(self.dtype).removeprefix("torch.")
        return Errand(ring, placement, rank, ticket, dtype, asked_ns=time.monotonic_ns())

    # --- turns ---

    def sleep(self) -> None:
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

        manager = self._engine.tokenizer_manager
        # A scheduler dies of being asked for its memory before it has put its last batch away, which it does some time
        # after the last reply.
        flushed = self._run(manager.flush_cache(timeout_s=_IDLE_WAIT_S))
        if not flushed.success:
            raise TeacherFault(
                f"SGLang did not become idle within {_IDLE_WAIT_S:g} s, and so cannot sleep ({flushed.message}); is "
                "somebody else asking this engine?"
            )
        self._run(manager.release_memory_occupation(ReleaseMemoryOccupationReqInput()))

    def wake_up(self) -> None:
        from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

        self._run(self._engine.tokenizer_manager.resume_memory_occupation(ResumeMemoryOccupationReqInput()))

    # --- preflight ---

    def hidden_rows(self, samples: Sequence[np.ndarray]) -> list[torch.Tensor]:
        lengths = [len(sample) for sample in samples]
        rows = np.setdiff1d(np.arange(sum(lengths)), np.cumsum(lengths) - 1).astype(np.int32)
        microbatch = Microbatch(np.concatenate(samples).astype(np.int32), tuple(lengths), rows)
        slot_bytes = len(rows) * self.hidden_size * self.dtype.itemsize
        with (
            HiddenRing.create(name="probe", num_slots=1, slot_bytes=slot_bytes) as ring,
            HiddenRing.attach(ring.handle, role="consumer") as consumer,
        ):
            self._run(self._prefill(microbatch, self._errand(ring.handle, "host", rank=-1, ticket=0)))
            with consumer.receive(0) as slot:
                return list(slot.tensor().clone().split([n - 1 for n in lengths]))

    def token_logprobs(self, samples: Sequence[np.ndarray]) -> list[torch.Tensor]:
        replies = self._run(
            self._engine.async_generate(
                input_ids=[sample.tolist() for sample in samples],
                sampling_params={"max_new_tokens": 1, "temperature": 0.0},
                return_logprob=True,
                logprob_start_len=0,
            )
        )
        # (log-probability, id, text) of each token; the first one has none.
        return [torch.tensor([p for p, *_ in r["meta_info"]["input_token_logprobs"][1:]]) for r in replies]

    def close(self) -> None:
        import psutil

        if self._requests is not None:
            self._requests.close()
        processes = _engine_processes()
        self._engine.shutdown()
        # Reaped here, or the next engine of this process would take the remains for its own.
        psutil.wait_procs(processes, timeout=_CLOSE_S)


def split(microbatch: Microbatch, errand: Errand) -> tuple[list[np.ndarray], list[Errand]]:
    """The samples of a microbatch as requests: each as long as its last loss row, those without one left out.

    Args:
        errand: of the whole microbatch; `num_rows`, `first_row` and `rows` are filled in here.
    """
    samples, errands = [], []
    errand = replace(errand, num_rows=microbatch.num_loss_tokens)
    begin = 0
    for length in microbatch.sequence_lengths:
        first, last = np.searchsorted(microbatch.loss_rows, (begin, begin + length))
        if last > first:
            rows = microbatch.loss_rows[first:last] - begin
            samples.append(microbatch.input_ids[begin : begin + int(rows[-1]) + 1])
            errands.append(replace(errand, first_row=int(first), rows=Errand.pack(rows)))
        begin += length
    if not samples:  # the record is wanted all the same
        return [microbatch.input_ids[:1]], [errand]
    return samples, errands


def _start_engine(options: dict[str, Any]) -> Any:
    """
    Raises:
        ConfigError: it has no such option.
        EngineDied: it did not come up; its own messages are in the log.
    """
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs

    known = inspect.signature(ServerArgs).parameters
    for name in options.keys() - known.keys():
        raise ConfigError(
            f"teacher.engine_args: SGLang {installed_version()} has no option {name}{nearest(name, known)}"
        )
    options = {**options, "custom_sigquit_handler": _on_sigquit}
    if not _has_plugins():

        class HookedEngine(Engine):
            run_scheduler_process_func = staticmethod(sglang_plugin.run_scheduler_process)

        return HookedEngine(**options)
    return Engine(**options)


def _engine_processes() -> dict[Any, str]:
    """Schedulers and detokenizer below this process (psutil's), by the names that they give themselves."""
    import psutil

    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if (name := process.name()).startswith("sglang::"):
                found[process] = name
    return found


def _has_ended(process: Any) -> bool:
    import psutil

    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _has_plugins() -> bool:
    """Whether this SGLang loads plugins and ours is among them."""
    if importlib.util.find_spec("sglang.srt.plugins") is None:
        return False
    found = importlib.metadata.entry_points(group="sglang.srt.plugins")
    return any(point.name == sglang_plugin.KEY for point in found)


def _on_sigquit(signum: int, frame: FrameType | None) -> None:
    """SGLang's processes send this signal when they fail while the engine starts."""
    raise EngineDied("a process of the SGLang engine failed while it started; its messages are above")
