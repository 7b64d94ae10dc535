"""The teacher on SGLang: its scheduler writes hidden states into the ring, see sglang_plugin.py.

This process takes requests and hands them to the engine, many at a time; no hidden state passes through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import os
import re
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch

from kdflow.config import TeacherConfig
from kdflow.errors import ConfigError, EngineDied, PeerDied, TeacherFault
from kdflow.modeling import load_model_config, resolve_device, resolve_dtype
from kdflow.teacher import sglang_plugin
from kdflow.teacher.base import TEACHERS, TeacherRings
from kdflow.teacher.sglang_plugin import Errand
from kdflow.tracing import OFF, Trace
from kdflow.transport import HiddenRing, PrefillRequest, ReadSlot, RequestRing, SleepOrder
from kdflow.types import Microbatch

T = TypeVar("T")

TRIED = ("0.5.18", "0.5.21", "0.5.23")  # the first is the oldest that is accepted
_TICK_S = 0.25
_CLOSE_S = 10.0
_IDLE_WAIT_S = 60.0

# Options of the engine that teacher.engine_args may not set, and why.
_OWN = {
    "model_path": "it is teacher.model",
    "device": "it is teacher.device",
    "dtype": "it is teacher.dtype",
    "tp_size": "it is teacher.tp_size",
    "dp_size": "teacher.num_workers are the replicas",
    "pp_size": "stages are not supported; use teacher.tp_size",
    "nnodes": "a teacher lives on one node",
    "enable_dp_attention": "hidden states are split over ranks there, which is not supported",
    "base_gpu_id": "the launcher counts GPUs",
    "enable_return_hidden_states": "it is always on",
    "disable_radix_cache": "it is always on, for rows of a cached prefix are not computed",
    "skip_tokenizer_init": "it is always on, for token ids go in",
    "custom_sigquit_handler": "the worker has its own",
    "enable_memory_saver": "transport.schedule: colocate turns it on",
    "enable_weights_cpu_backup": "transport.schedule: colocate turns it on",
    "speculative_algorithm": "a teacher does not decode",
}


@TEACHERS.register("sglang")
class SGLangTeacher:
    """An engine of one or more GPUs; requests go in as they come, and it batches and chunks them as it likes."""

    def __init__(self, config: TeacherConfig, *, gpu: int, sleeps: bool = False) -> None:
        self.device = resolve_device(config.device, gpu)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.hidden_size: int = load_model_config(config.model).get_text_config().hidden_size
        self._num_workers = config.num_workers
        self._requests: RequestRing | None = None
        self._rings: TeacherRings | None = None
        options = engine_options(config, self.device, self.dtype, sleeps=sleeps)
        check_version()
        _prepare_environment(self.device, config.tp_size)
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
                f"SGLang {_installed_version()} (tried: {', '.join(TRIED)}) runs without kdflow's plugin, which did "
                "not answer the first request. Its traceback is above if it failed to load; SGLANG_PLUGINS must not "
                f"leave {sglang_plugin.KEY} out; after an update of kdflow, install it again"
            )

    async def _generate(self, samples: Sequence[np.ndarray], errands: Sequence[Errand]) -> list[Any]:
        """Prefills; why the engine ended those requests for which the plugin did not answer."""
        replies = await self._engine.async_generate(
            input_ids=[sample.tolist() for sample in samples],
            # With no token to generate the engine neither samples nor begins to decode.
            sampling_params=[{"max_new_tokens": 0, "custom_params": errand.to_params()} for errand in errands],
            return_hidden_states=True,
        )
        told = [reply["meta_info"] for reply in replies]
        return [meta.get("finish_reason") for meta in told if sglang_plugin.KEY not in meta]

    async def _prefill(self, microbatch: Microbatch, errand: Errand) -> None:
        """Has the loss rows of a microbatch written into the slot that `errand` names."""
        if unanswered := await self._generate(*split(microbatch, errand)):
            raise TeacherFault(
                f"ticket {errand.ticket}: SGLang ended {len(unanswered)} requests without its plugin (finish reason "
                f"{unanswered[0]}). If it refused them, raise max_total_tokens or context_length in "
                "teacher.engine_args; else another plugin is in the way"
            )

    # --- the teacher's side of the rings ---

    def attach(self, rings: TeacherRings) -> None:
        self._rings = rings
        self._requests = RequestRing.attach(rings.requests, role="consumer")

    def serve(self, *, limit: int | None, idle: Callable[[], None], trace: Trace = OFF) -> SleepOrder | bool:
        assert self._requests is not None, "attach first"
        return self._run(self._serve(self._requests, limit, idle, trace))

    async def _serve(
        self, requests: RequestRing, limit: int | None, idle: Callable[[], None], trace: Trace
    ) -> SleepOrder | bool:
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
            if not await self._wait(requests if may_take else None, answering):
                idle()
            for task in [task for task in answering if task.done()]:
                answering.remove(task)
                task.result()
                trace.end_of_step()

    async def _wait(self, requests: RequestRing | None, answering: set[asyncio.Task[None]]) -> bool:
        """Until an answer is done or a request may be there; False after a second of neither."""
        news = self._loop.create_future()
        if requests is not None:
            self._loop.add_reader(requests.ready_fd(), lambda: news.done() or news.set_result(None))
        try:
            done, _ = await asyncio.wait({news, *answering}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            return bool(done)
        finally:
            if requests is not None:
                self._loop.remove_reader(requests.ready_fd())

    async def _answer(self, message: ReadSlot) -> None:
        """The request stays in the ring until it is answered: should we die before, another worker finds it."""
        assert self._rings is not None
        request = PrefillRequest.decode(bytes(message.buffer()))
        errand = self._errand(self._rings.hidden[request.rank], self._rings.placement, request.ticket)
        await self._prefill(request.microbatch, errand)
        message.release()

    def _errand(self, ring: str, placement: str, ticket: int) -> Errand:
        dtype = str(self.dtype).removeprefix("torch.")
        return Errand(ring=ring, placement=placement, ticket=ticket, dtype=dtype, asked_ns=time.monotonic_ns())

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
            self._run(self._prefill(microbatch, self._errand(ring.handle, "host", 0)))
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


def engine_options(
    config: TeacherConfig, device: torch.device, dtype: torch.dtype, *, sleeps: bool = False
) -> dict[str, Any]:
    """Keywords of sglang.Engine.

    Raises:
        ConfigError: teacher.engine_args sets what is kdflow's to set; what frees a GPU's memory is not installed.
    """
    for name in config.engine_args:
        if name in _OWN:
            raise ConfigError(f"teacher.engine_args: leave {name} out; {_OWN[name]}")
    options: dict[str, Any] = {
        "model_path": str(Path(config.model).expanduser()),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "tp_size": config.tp_size,
        "enable_return_hidden_states": True,
        "disable_radix_cache": True,
        "skip_tokenizer_init": True,
        "custom_sigquit_handler": _on_sigquit,
        # A teacher never decodes, which is what graphs are for.
        "disable_cuda_graph": True,
        # Else a scheduler without work takes a whole core.
        "sleep_on_idle": True,
        "log_level": "error",
    }
    if device.type == "cuda":
        last = (device.index or 0) + config.tp_size
        if last > torch.cuda.device_count():
            raise ConfigError(
                f"teacher.tp_size: {config.tp_size} GPUs from {device.index} on are needed, there are "
                f"{torch.cuda.device_count()}"
            )
        options["base_gpu_id"] = device.index
        if sleeps:
            if importlib.util.find_spec("torch_memory_saver") is None:
                raise ConfigError(
                    "transport.schedule: colocate needs torch_memory_saver, with which SGLang gives its memory back; "
                    "pip install torch_memory_saver"
                )
            # Without the backup an engine wakes with weights that are anything.
            options |= {"enable_memory_saver": True, "enable_weights_cpu_backup": True}
    else:
        options |= {"mem_fraction_static": 0.5, "max_total_tokens": 16384}
    return options | config.engine_args


def check_version() -> None:
    """
    Raises:
        ConfigError: SGLang is missing or too old.
    """
    found = _installed_version()
    if found is None:
        raise ConfigError(
            f"teacher.backend: sglang is not installed; pip install 'sglang>={TRIED[0]}', or use backend hf"
        )
    if _numbers(found) < _numbers(TRIED[0]):
        raise ConfigError(
            f"teacher.backend: expected sglang {TRIED[0]} or later (tried: {', '.join(TRIED)}), got {found}; update it"
        )


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _prepare_environment(device: torch.device, tp_size: int) -> None:
    """What SGLang reads when it is imported, here and in its processes."""
    os.environ[sglang_plugin.VARIABLE] = "1"
    if device.type == "cpu":
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        if tp_size > 1:
            cores = sorted(os.sched_getaffinity(0))
            shares = [cores[rank::tp_size] or cores for rank in range(tp_size)]
            binding = "|".join(",".join(map(str, share)) for share in shares)
            os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", binding)


def _start_engine(options: dict[str, Any]) -> Any:
    """
    Raises:
        EngineDied: it did not come up; its own messages are in the log.
    """
    from sglang.srt.entrypoints.engine import Engine

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
