"""The training loop of every stage: a step function, a loader and a config go in, the best weights come out.

On one process, a run that was killed at any moment and started again gives the same losses, batches and weights as one
that was not, bit for bit. Over several processes, the gradient is that of the whole batch, however unevenly it is
spread over them. A run may continue with another number of processes and another sharding: it reads the same data and
keeps the optimizer's state; only the random numbers (dropout) differ.
"""

import contextlib
import logging
import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from tqdm import tqdm

from lumrec.modules.moments import average_moments
from lumrec.run import limits
from lumrec.run.distributed import gathered, rank, world_size
from lumrec.run.errors import UserError
from lumrec.run.files import write_atomically
from lumrec.run.folder import RunFolder
from lumrec.run.interrupt import SIGNALS, Interrupted, Interrupts
from lumrec.train.checkpoint import Checkpointer, Loaded
from lumrec.train.checkpoint_meta import Fingerprint
from lumrec.train.config import TrainConfig
from lumrec.train.flops import Utilization
from lumrec.train.non_finite import NonFiniteError, save_batch
from lumrec.train.optimizers import build_optimizer, clip_grad_norm, learning_rate_factor
from lumrec.train.plan import plan_json, plan_table
from lumrec.train.prefetch import Fetched, prefetch
from lumrec.train.randomness import random_state, seed_generators, set_random_state
from lumrec.train.state import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepOutput:
    """What a step function returns: sums over this rank's batch, and how many events they are sums of.

    loss_sum: scalar with a gradient. count: number of terms, may be 0. metrics: detached scalars, also sums.
    tokens: number of tokens that the model read, if it reads tokens; only for the log's tokens_per_s.
    """

    loss_sum: Tensor
    count: Tensor | int
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: int = 0


class Loader(Protocol):
    """What `fit` reads batches from; the same state gives the same batches again.

    `__iter__` gives the rest of the current epoch and then moves on to the next. `state_dict()`, which is
    JSON-compatible, is the position after the last batch, the same on every rank; a loader with another number of ranks
    accepts it too and divides the rest of the epoch among them. The loader is called in a separate thread, so it draws
    only from its own random generators. Every rank gives the same number of batches per epoch. Batches have
    `.to(device)`.
    """

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def fit(
    *,
    model: DistributedModelParallel,
    loader: Loader,
    step: Callable[[nn.Module, Any], StepOutput],
    config: TrainConfig,
    run: RunFolder,
    evaluate: Callable[[], dict[str, float]] | None = None,
    select: str = "",
    progress: str = "train",
    fingerprint: Fingerprint | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Trains `model` (from `parallel.shard`) and leaves its best weights in it; returns the run's metrics by name.

    step: `(model, batch) → StepOutput`; calls `model` once. evaluate: metrics of the current weights, called in eval
        mode without gradients, the same on every rank (rank 0's are used). select: the metric to maximise, "-name" to
        minimise; "" takes the last weights. fingerprint: what a checkpoint must agree with (data, schema, model
        settings). dtype: of the dense part's matrix products. If `run.resumed`, training continues from the newest
        complete checkpoint.

    The metrics: loss (mean of the last log line), best_step, steps, epochs, events_per_s and tokens_per_s (evaluation
    and checkpoints left out), mfu (share of the matrix products' peak in `dtype`, as measured before the first step,
    with the FLOPs per event of the process's first step), data_wait (share of the training time), memory_gib, wall_s,
    and "valid/<name>" of the best evaluation.

    Raises NonFiniteError for a loss or gradient that is not finite, UserError for a config that cannot work and for a
    checkpoint with another fingerprint. SIGINT (Ctrl-C) or SIGTERM at any rank ends the run on all ranks after the
    current step (and the evaluation that is due there): a checkpoint is saved, and Interrupted is raised, which says
    how to continue.
    """
    return _Fit(model, loader, step, config, run, evaluate, select, progress, fingerprint, dtype).run()


@dataclass(eq=False)
class _Fit:
    """One call of `fit`, with its arguments."""

    model: DistributedModelParallel
    loader: Loader
    step: Callable[[nn.Module, Any], StepOutput]
    config: TrainConfig
    run_folder: RunFolder
    evaluate: Callable[[], dict[str, float]] | None
    select: str
    name: str
    fingerprint: Fingerprint | None
    dtype: torch.dtype

    def __post_init__(self) -> None:
        model, config = self.model, self.config
        _check(config, self.loader, self.evaluate, self.select)
        self.optimizer = build_optimizer(model, config.optimizer)
        self.checkpointer = Checkpointer(
            self.run_folder.path / "checkpoints",
            model=model,
            optimizer=self.optimizer,
            fingerprint=self.fingerprint,
            keep=config.keep_checkpoints,
            optimizer_state=config.optimizer_state,
        )
        self.state = TrainState()
        self.factor = 1.0  # of the last step's learning rate
        self.grad_norm: float | None = None  # of the last step
        self.interrupts = Interrupts()
        self.ended_by: signal.Signals | None = None
        self.utilization = Utilization(model.device, self.dtype)

    def run(self) -> dict[str, float]:
        with self.interrupts:
            return self._run()

    def _run(self) -> dict[str, float]:
        self._start()
        started, wall_before = time.perf_counter(), self.state.wall_s
        quiet = rank() != 0 or not sys.stderr.isatty()
        with tqdm(total=self.total_steps, initial=self.state.step, desc=self.name, disable=quiet) as bar:
            while not self._done():
                with contextlib.closing(prefetch(self.loader, self.model.device)) as batches:
                    for fetched in batches:
                        self._train(fetched)
                        bar.update()
                        self.state.wall_s = wall_before + time.perf_counter() - started
                        self._after_step(fetched, bar)
                        if self._done():
                            break
                self.loader.load_state_dict(fetched.loader_state)  # the thread went ahead
        best = self.state.best_step
        if best and best != self.state.step:
            logger.info("%s: the weights of step %d were the best", self.name, best)
            self.checkpointer.load_model(best)
        self.state.wall_s = wall_before + time.perf_counter() - started
        return self._result()

    def _start(self) -> None:
        loaded = self.checkpointer.load_latest() if self.run_folder.resumed else None
        if loaded is None:
            if world_size() > 1:  # the weights are equal already; dropout must differ by rank
                torch.manual_seed(torch.initial_seed() + rank())
        else:
            self._resume(loaded)
        self.state.set_steps_per_epoch(len(self.loader))
        if self.run_folder.resumed:
            self.run_folder.rewind(self.state.step)
        plans = {"plan.txt": plan_table(self.model), "plan.json": plan_json(self.model.plan)}
        if rank() == 0:
            for name, plan in plans.items():
                write_atomically(self.run_folder.path / name, plan)
        self.model.train()

    def _resume(self, loaded: Loaded) -> None:
        self.state = TrainState.of(loaded.state)
        # A state of the right form that still fails in our own code is a bug, and shows its traceback.
        again = "remove it to continue from the one before, or start the run again with overwrite=true"
        position = loaded.local.get("loader", {})
        if _kinds(position) != _kinds(self.loader.state_dict()):
            raise UserError(f"the checkpoint of step {loaded.step} holds no usable position in the data; {again}")
        self.loader.load_state_dict(position)
        if loaded.same_ranks:
            try:
                set_random_state(loaded.local["random"])
            except (KeyError, IndexError, TypeError, ValueError, OverflowError, RuntimeError) as error:
                raise UserError(
                    f"the checkpoint of step {loaded.step} holds no usable random state "
                    f"({type(error).__name__}: {error}); {again}"
                ) from error
        if not loaded.same_ranks:
            seed_generators(torch.initial_seed(), self.state.step, rank())
            if rank() == 0:
                logger.warning(
                    "%s: continues with %d process(es), not as many as before. The rest of the epoch is divided among "
                    "them, a step covers the batches of all of them, and learning rates do not change. Random numbers "
                    "come from new seeds (from seed, step and rank), so from here on this run is not bit for bit equal "
                    "to one with the same number of processes throughout",
                    self.name,
                    world_size(),
                )
        logger.info("%s: resumed at step %d (epoch %d)", self.name, self.state.step, self.state.epoch)

    @property
    def schedule_steps(self) -> int:
        """Steps of the whole training, as the run began to count them."""
        steps = self.config.epochs * round(self.state.steps_per_epoch * self.state.schedule_rate)
        return min(steps, self.config.max_steps) if self.config.max_steps else steps

    @property
    def total_steps(self) -> int:
        left = (self.schedule_steps - self.state.schedule_step) / self.state.schedule_rate
        return self.state.step + max(0, math.ceil(left))

    def _learning_rate_factor(self) -> float:
        """Of the next step."""
        return learning_rate_factor(self.config.optimizer, self.state.schedule_step, self.schedule_steps)

    def _done(self) -> bool:
        state, config = self.state, self.config
        return state.stopped or state.epoch >= config.epochs or 0 < config.max_steps <= state.schedule_step

    def _train(self, fetched: Fetched) -> None:
        """One step. A loss that is not finite raises before any weight has changed."""
        started = time.perf_counter()
        config, state = self.config.optimizer, self.state
        self.factor = self._learning_rate_factor()
        self.optimizer.set_learning_rate(self.factor)
        self.optimizer.zero_grad(set_to_none=True)
        with self.utilization.forward():
            output = self.step(self.model, fetched.batch)
        here = {number.name: float(number in self.interrupts.received) for number in SIGNALS}
        sums = _sum_over_ranks(output, here)
        anywhere = [number for number in SIGNALS if sums.pop(number.name)]
        self.ended_by = anywhere[0] if anywhere else None
        state.step += 1
        if not math.isfinite(sums["loss"]):
            self._stop(fetched.batch, "loss", sums["loss"], here=not math.isfinite(float(output.loss_sum.detach())))
        # DDP and TorchRec average gradients over ranks; this factor makes it the gradient of the global mean.
        with self.utilization.backward():
            (output.loss_sum * (world_size() / max(sums["count"], 1.0))).backward()
        self.utilization.count_step(sums["count"])
        if config.clip_grad_norm and self.optimizer.dense_parameters:
            self.grad_norm = clip_grad_norm(self.optimizer.dense_parameters, config.clip_grad_norm)
            if not math.isfinite(self.grad_norm):
                self._stop(fetched.batch, "gradient norm", self.grad_norm, here=True)
        self.optimizer.step()
        state.epoch += fetched.is_last
        state.num_events += sums["count"]
        state.num_tokens += sums["tokens"]
        seconds = {"wait_s": fetched.wait_s, "train_s": fetched.wait_s + time.perf_counter() - started}
        state.wait_s += seconds["wait_s"]
        state.train_s += seconds["train_s"]
        for name, value in {**sums, **seconds}.items():
            state.window[name] = state.window.get(name, 0.0) + value

    def _after_step(self, fetched: Fetched, bar: Any) -> None:
        def due(every: int) -> bool:
            return self._done() or (self.state.step % every == 0 if every else fetched.is_last)

        if due(self.config.log_every):
            self._log(bar)
        better = self._evaluate() if self.evaluate is not None and due(self.config.eval_every) else False
        if better or due(self.config.checkpoint_every) or self.ended_by is not None:
            average_moments(self.model)  # a checkpoint saves those of one rank
            path = self.checkpointer.save(
                self.state.step,
                state=asdict(self.state),
                local={"loader": fetched.loader_state, "random": random_state()},
                best_step=self.state.best_step or self.state.step,
            )
        if self.ended_by is not None:
            self.run_folder.close()
            raise Interrupted(
                self.ended_by,
                f"{self.name}: {self.ended_by.name} ended training at step {self.state.step} of {self.total_steps}; it "
                f"is saved in {path}, and the same command continues from there",
            )

    def _log(self, bar: Any) -> None:
        window, self.state.window = self.state.window, {}
        count, tokens, wait_s, train_s = (window.pop(name, 0.0) for name in ("count", "tokens", "wait_s", "train_s"))
        line: dict[str, float] = {name: value / max(count, 1.0) for name, value in window.items()}
        self.state.loss = line["loss"]
        if self.grad_norm is not None:
            line["grad_norm"] = self.grad_norm
        line["learning_rate"] = self.factor * self.config.optimizer.dense_lr
        line |= {**self._rates(count, tokens, train_s), "data_wait": wait_s / train_s, "memory_gib": self._memory_gib()}
        self.run_folder.log(self.state.step, epoch=self.state.epoch, **line)
        if bar.disable:
            figures = "  ".join(f"{name} {value:.4g}" for name, value in line.items())
            if rank() == 0:
                logger.info("%s: step %d/%d  %s", self.name, self.state.step, self.total_steps, figures)
        else:
            bar.set_postfix(loss=f"{line['loss']:.4f}", events_per_s=f"{line['events_per_s']:.0f}")

    def _evaluate(self) -> bool:
        """Whether the current weights are the best so far. Leaves the random generators as they were."""
        assert self.evaluate is not None
        before = random_state()
        self.model.eval()
        with torch.no_grad():
            metrics = {name: float(value) for name, value in self.evaluate().items()}
        self.model.train()
        set_random_state(before)
        if world_size() > 1:  # rank 0's, so that all ranks take the same decision
            shared = [metrics]
            dist.broadcast_object_list(shared, src=0)
            metrics = shared[0]
        state = self.state
        self.run_folder.log(state.step, epoch=state.epoch, **{f"valid/{name}": v for name, v in metrics.items()})
        if rank() == 0:
            figures = "  ".join(f"{name} {value:.5g}" for name, value in metrics.items())
            logger.info("%s: step %d/%d  valid: %s", self.name, state.step, self.total_steps, figures)
        if not self.select:
            state.best_metrics = metrics
            return False
        name = self.select.removeprefix("-")
        if name not in metrics:
            raise UserError(
                f"select={self.select!r}, but the evaluation gives {', '.join(sorted(metrics)) or 'nothing'}"
            )
        value = -metrics[name] if self.select.startswith("-") else metrics[name]
        better = not math.isnan(value) and (state.best_value is None or value > state.best_value)
        if better:
            state.best_step, state.best_value, state.best_metrics = state.step, value, metrics
        state.evaluations_without_gain = 0 if better else state.evaluations_without_gain + 1
        if 0 < self.config.patience <= state.evaluations_without_gain:
            logger.info("%s: %d evaluations without a better %s: training ends", self.name, self.config.patience, name)
            state.stopped = True
        return better

    def _stop(self, batch: Any, what: str, value: float, *, here: bool) -> NoReturn:
        where = "another rank's batch"
        if here:
            path = self.run_folder.path / f"non-finite-step-{self.state.step}-rank-{rank()}.pt"
            save_batch(batch, path)
            where = f"the batch is saved in {path}: read it with torch.load(path, weights_only=True)"
        rates = f"table_lr={self.config.optimizer.table_lr}, dense_lr={self.config.optimizer.dense_lr}"
        raise NonFiniteError(
            f"the {what} is {value} at step {self.state.step} (epoch {self.state.epoch}); {where}. Look for values "
            f"that are not finite in it, or lower the learning rates ({rates}), or add warmup_steps. Earlier "
            "checkpoints are unchanged"
        )

    def _rates(self, num_events: float, num_tokens: float, seconds: float) -> dict[str, float]:
        rates = {"events_per_s": num_events / max(seconds, 1e-9)}
        if num_tokens:
            rates["tokens_per_s"] = num_tokens / max(seconds, 1e-9)
        if self.utilization.at_one_event_per_s is not None:
            rates["mfu"] = rates["events_per_s"] * self.utilization.at_one_event_per_s
        return rates

    def _memory_gib(self) -> float:
        """Highest memory so far: of torch on CUDA, of the whole process on CPU."""
        if self.model.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.model.device) / 2**30
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)

    def _result(self) -> dict[str, float]:
        state = self.state
        return {
            "loss": state.loss,
            "best_step": state.best_step or state.step,
            "steps": state.step,
            "epochs": state.epoch,
            **self._rates(state.num_events, state.num_tokens, state.train_s),
            "data_wait": state.wait_s / max(state.train_s, 1e-9),
            "memory_gib": self._memory_gib(),
            "wall_s": state.wall_s,
            **{f"valid/{name}": value for name, value in state.best_metrics.items()},
        }


def _check(config: TrainConfig, loader: Loader, evaluate: Callable[[], dict[str, float]] | None, select: str) -> None:
    limits.check(config)
    if evaluate is None and (select or config.patience):
        raise UserError(f"select={select!r} and patience={config.patience} need an evaluation, and there is none")
    if config.patience and not select:
        raise UserError(f"patience={config.patience} needs a metric to select by")
    lengths = gathered(len(loader))
    if len(set(lengths)) > 1 or lengths[0] == 0:
        raise UserError(f"batches per epoch on each rank are {lengths}: expected the same number, 1 or more, on all")


def _kinds(state: Any) -> dict[str, type]:
    """The entries of a loader's state with their types."""
    return {name: type(value) for name, value in state.items()} if isinstance(state, dict) else {}


def _sum_over_ranks(output: StepOutput, others: Mapping[str, float]) -> dict[str, float]:
    """loss, count, tokens, `others` and metrics summed over all ranks in double precision; one all-reduce."""
    own = {"loss": output.loss_sum, "count": output.count, "tokens": output.tokens, **others}
    taken = own.keys() & output.metrics.keys()
    if taken:
        raise UserError(f"a step's metrics may not be called {sorted(taken)}: fit logs these itself")
    values = {**own, **{name: output.metrics[name] for name in sorted(output.metrics)}}
    device = output.loss_sum.device
    total = torch.stack([torch.as_tensor(value, device=device).detach().double() for value in values.values()])
    if world_size() > 1:
        dist.all_reduce(total)
    return dict(zip(values, total.tolist(), strict=True))
