from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from kdflow.config import OptimizerConfig
from kdflow.errors import CheckpointError
from kdflow.student import CheckpointFolder, CheckpointStore, FSDP2Student
from kdflow.student.checkpoint_folder import CheckpointInfo
from kdflow.student.optimizer import adamw
from support.ranks import run_on_ranks
from support.student import Rows, load_samples, make_student, rank_steps, whole
from support.tiny import make_config, with_dropout


def weights_of(student: FSDP2Student) -> dict[str, torch.Tensor]:
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in student.model.named_parameters()}
    return {n: p.detach().clone() for n, p in whole.items()}


def go_on(folder: Path, model: str, store: Path, options: dict[str, Any], start: int, saves: tuple[int, ...]):
    """Steps `start` to 8, from the checkpoint of that step, with checkpoints on the way; losses and weights.

    The next step begins right after a save, so what is on disk is what was there when it was called.
    """
    student, rows = make_student(model, str(folder / "teacher"), **options), Rows(folder)
    checkpoints = CheckpointStore(store, student, seed=3)
    torch.manual_seed(dist.get_rank())
    if start:
        found = checkpoints.load()
        assert found is not None
        assert found.num_steps_done == start
    losses = []
    for step in rank_steps(
        load_samples(folder),
        num_steps=8,
        samples_per_step=4,
        tokens_per_microbatch=256,
        start=start,
    ):
        loss = torch.zeros(())
        for microbatch in step.microbatches:
            output = student.forward_backward(
                microbatch,
                lambda m=microbatch: rows(m),
                num_items=step.num_loss_tokens,
                last=microbatch is step.microbatches[-1],
            )
            loss += output.loss.detach().cpu()
        dist.all_reduce(loss)
        losses.append(loss.item() / dist.get_world_size())
        student.optimizer_step(step.index)
        if step.index + 1 in saves:
            checkpoints.save(step.index + 1)
    checkpoints.wait()
    checkpoints.close()
    return losses, weights_of(student)


def straight_and_resumed(folder: Path, model: str, store: Path, options: dict[str, Any]):
    straight = go_on(folder, model, store, options, 0, (2, 4))
    if dist.get_rank() == 0:
        assert [p.name for p in store.iterdir()] == ["step-000004"]
    return straight, go_on(folder, model, store, options, 4, ())


@pytest.mark.parametrize("num_ranks, dtype", [(1, "float32"), (1, "bfloat16"), (2, "float32")])
def test_resume_is_exact(tiny: Path, tmp_path: Path, num_ranks: int, dtype: str) -> None:
    model, options = str(with_dropout(tiny / "student", tmp_path / "model")), {"compute_dtype": dtype}
    results = run_on_ranks(
        num_ranks, tmp_path / "ranks", straight_and_resumed, tiny, model, tmp_path / "store", options
    )
    for (losses, weights), (again, resumed) in results:
        assert losses[4:] == again
        assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def both_ways(folder: Path, model: str, ours: Path, theirs: Path):
    """Straight with a checkpoint in `ours`; and on from one that another number of ranks left in `theirs`."""
    straight = go_on(folder, model, ours, {}, 0, (4,))
    return straight, go_on(folder, model, theirs, {}, 4, ()) if theirs.exists() else None


def test_resume_on_another_number_of_ranks(tiny: Path, tmp_path: Path) -> None:
    """Weights and optimizer are cut anew; sums run in another order."""
    model, one, two = str(tiny / "student"), tmp_path / "one", tmp_path / "two"
    (((losses, weights), _),) = run_on_ranks(1, tmp_path / "first", both_ways, tiny, model, one, two)
    results = [resumed for _, resumed in run_on_ranks(2, tmp_path / "second", both_ways, tiny, model, two, one)]
    results += run_on_ranks(1, tmp_path / "third", go_on, tiny, model, two, {}, 4, ())
    assert len(results) == 3
    for again, resumed in results:
        assert again == pytest.approx(losses[4:], rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(resumed[name], weight, atol=1e-5, rtol=1e-4)


def state_of(student: FSDP2Student) -> list[dict[str, torch.Tensor]]:
    states = [student.optimizer.state[p] for p in student.module.parameters()]
    return [{name: whole(value).clone() for name, value in state.items()} for state in states]


def resume_with_other_options(folder: Path, model: str, store: Path, one_group: bool) -> None:
    """Three steps, then a checkpoint; and that one in a run with other options, which does one more."""
    other = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.7)
    student, resumed = (make_student(model, str(folder / "teacher")) for _ in range(2))
    if one_group:
        student.optimizer = torch.optim.AdamW(student.module.parameters(), lr=1e-3)
    resumed.optimizer = adamw(resumed.module, other)
    for _ in range(3):
        for weight in student.module.parameters():
            weight.grad = torch.ones_like(weight)
        student.optimizer.step()
    checkpoints, again = (CheckpointStore(store, of) for of in (student, resumed))
    checkpoints.save(3)
    checkpoints.wait()
    assert again.load() is not None
    weights, saved = weights_of(student), state_of(student)
    assert all(torch.equal(weight, weights[name]) for name, weight in weights_of(resumed).items())
    for one, two in zip(saved, state_of(resumed), strict=True):
        assert one.keys() == two.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, two[name]) for name, value in one.items())
    made = adamw(resumed.module, other).param_groups
    for expected, group in zip(made, resumed.optimizer.param_groups, strict=True):
        assert group["params"] == expected["params"]
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in expected.items() if k != "params"}
    for weight in resumed.module.parameters():
        weight.grad = torch.zeros_like(weight)
    resumed.optimizer.step()
    for before, now in zip(saved, state_of(resumed), strict=True):  # without a gradient the moments fade by the betas
        torch.testing.assert_close(now["exp_avg"], 0.5 * before["exp_avg"])
        torch.testing.assert_close(now["exp_avg_sq"], 0.6 * before["exp_avg_sq"])
    for store_of in (checkpoints, again):
        store_of.close()


@pytest.mark.parametrize("num_ranks, one_group", [(1, False), (2, False), (1, True)])
def test_options_of_the_optimizer_are_those_of_the_run(
    tiny: Path, tmp_path: Path, num_ranks: int, one_group: bool
) -> None:
    """Moments and steps are those of the checkpoint, in whatever groups it had them."""
    job = (resume_with_other_options, tiny, str(tiny / "student"), tmp_path / "store", one_group)
    run_on_ranks(num_ranks, tmp_path / "ranks", *job)


def random_numbers(folder: Path, model: str, store: Path, num_loads: int) -> list[float]:
    student = make_student(model, str(folder / "teacher"))
    checkpoints = CheckpointStore(store, student, seed=3)
    if num_loads == 0:
        checkpoints.save(5)
        checkpoints.wait()
    numbers = [torch.rand(()).item()]
    for _ in range(num_loads):
        assert checkpoints.load() is not None
        numbers.append(torch.rand(()).item())
    checkpoints.close()
    return numbers


def test_random_state_of_ranks_old_and_new(tiny: Path, tmp_path: Path) -> None:
    """Known ranks go on with theirs; one that is new gets its own, always the same."""
    job = (random_numbers, tiny, str(tiny / "student"), tmp_path / "store")
    ((one,),) = run_on_ranks(1, tmp_path / "one", *job, 0)
    first, second = run_on_ranks(2, tmp_path / "two", *job, 2)
    assert first[1:] == [one, one]
    assert second[1] == second[2] != one


def load_other(folder: Path, model: str, store: Path, data: dict[str, int]) -> str:
    student = make_student(model, str(folder / "teacher"))
    checkpoints = CheckpointStore(store, student, data=data)
    try:
        if checkpoints.load() is None:
            checkpoints.save(1)
            checkpoints.wait()
    except CheckpointError as error:
        return str(error)
    finally:
        checkpoints.close()
    return ""


def test_other_student_and_other_data_are_refused(tiny: Path, tmp_path: Path) -> None:
    other, store = tmp_path / "other", tmp_path / "store"
    LlamaForCausalLM(make_config(num_layers=3)).save_pretrained(other)

    def load(name: str, model: Path, num_samples: int) -> str:
        job = (load_other, tiny, str(model), store, {"data.num_samples": num_samples})
        return run_on_ranks(1, tmp_path / name, *job)[0]

    assert load("save", tiny / "student", 36) == ""
    assert load("same", tiny / "student", 36) == ""
    assert "data.num_samples was 36, now it is 35" in load("data", tiny / "student", 35)
    text = load("model", other, 36)
    assert "step-000001 is of another run: student.num_parameters was" in text
    assert "another output_dir" in text
    (damaged,) = store.glob("step-*/*.distcp")
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    assert "step-000001 cannot be read" in load("damaged", tiny / "student", 36)


def save_without_room(folder: Path, model: str, store: Path) -> dict[str, Any]:
    """Saves at step 1, finds files limited at 2, and has room again at 3."""
    student = make_student(model, str(folder / "teacher"))
    checkpoints = CheckpointStore(store, student)
    checkpoints.save(1)
    checkpoints.wait()
    before, after = weights_of(student), None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a write beyond fails, in earnest
        checkpoints.save(2)
        with pytest.raises(CheckpointError) as error:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = {"error": str(error.value), "told": checkpoints.poll(), "told twice": checkpoints.poll()}
    found["left"] = sorted(p.name for p in store.iterdir())
    assert checkpoints.load() is not None
    after = weights_of(student)
    found["same"] = all(torch.equal(before[n], after[n]) for n in before)
    for _ in range(2):  # the second time it is there
        checkpoints.save(3)
        checkpoints.wait()
    checkpoints.close()
    found["then"] = sorted(p.name for p in store.iterdir())
    return found


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_save_that_fails_costs_nothing(tiny: Path, tmp_path: Path, num_ranks: int) -> None:
    for found in run_on_ranks(
        num_ranks, tmp_path / "ranks", save_without_room, tiny, str(tiny / "student"), tmp_path / "store"
    ):
        assert "checkpoint of step 2 was not written (rank 0: " in found["error"]
        assert "File too large" in found["error"]
        assert "step-000001 is kept" in found["error"]
        assert found["told"] in found["error"]
        assert found["told twice"] is None
        assert found["same"]
        assert found["left"] == ["step-000001"]
        assert found["then"] == ["step-000003"]


def make(folder: CheckpointFolder, num_steps_done: int, score: float | None = None) -> None:
    aside = folder.aside(num_steps_done)
    aside.mkdir(parents=True)
    folder.publish(aside, CheckpointInfo(num_steps_done, 1, score=score))


def test_a_name_that_is_taken_is_not_given_away(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    make(folder, 2)
    with pytest.raises(CheckpointError, match="step-000002 is there already"):
        make(folder, 2)
    (tmp_path / "step-000002").rename(tmp_path / "step-000002.away")
    assert folder.newest() is None
    folder.publish(folder.aside(2), CheckpointInfo(2, 1))
    assert [p.name for p in tmp_path.glob("step-*2")] == ["step-000002"]


def test_which_checkpoints_stay(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step, score in ((2, 0.5), (4, 0.3), (6, None), (8, 0.4), (1000000, None)):
        make(folder, step, score)
    assert [c.info.num_steps_done for c in folder.all()] == [2, 4, 6, 8, 1000000]
    assert folder.find(None).info.num_steps_done == 1000000
    assert folder.find("best").info.num_steps_done == 4
    assert folder.find("step-8") == folder.find("step-000008")
    with pytest.raises(CheckpointError, match=r"no checkpoint step-3 in .*; there are: step-000002, step-000004"):
        folder.find("step-3")
    folder.prune(keep_last=2, keep_best=True)
    assert [c.info.num_steps_done for c in folder.all()] == [4, 8, 1000000]
    folder.prune(keep_last=1, keep_best=False)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1000000"]
    with pytest.raises(CheckpointError, match=r"training\.keep_best"):
        folder.find("best")


def test_what_a_killed_process_leaves_is_neither_taken_nor_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    make(folder, 2)
    for name in ("writing-000004", "removing-000001"):
        (tmp_path / name).mkdir()
    assert [c.info.num_steps_done for c in folder.all()] == [2]
    folder.clear_remains()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]
