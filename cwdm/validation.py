"""What is measured while a model is trained: on held-out cases, and on a few of its own.

Errors at fixed times tell what has been learnt, sub-bands of samples against those of the data tell
noise from blur, and whole synthetic images are compared as ``evaluate`` does.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import default_collate

from cwdm.case import Case
from cwdm.conditioning import mean_of_conditions
from cwdm.config import Config, Sampling
from cwdm.dataset import Sample, Source, TrainingCase, TrainingData, inputs
from cwdm.denoiser import Denoiser
from cwdm.engine import Engine
from cwdm.errors import InputError
from cwdm.evaluate import Prediction, compare, picture
from cwdm.files import safe_name
from cwdm.intensity import NORMALIZATIONS, ScalePrior
from cwdm.losses import band_loss
from cwdm.machine import Precision
from cwdm.metrics import Aligned, mae, psnr, ssim
from cwdm.modality import Modality
from cwdm.model import Model
from cwdm.montage import write_png
from cwdm.noise import noise_stream
from cwdm.synthesis import Synthesizer

__all__ = ["BY_HEART_DB", "HeldOut", "Validation"]

_PROBES = 2
"""Fixed blocks, of training and of held-out cases each."""
_OF_PROBES = 4
"""Keeps their random numbers apart from those of training."""
_TIMES = 5
"""At how many times their errors are measured."""
_LOOKED_AT = 8
"""Training samples that tell how the data look to the network."""


BY_HEART_DB = 35.0
"""PSNR at which an overfit run has shown that it can learn, and ends."""
_OVERFIT_EVERY = 100
"""Steps after which such a run looks at what it has learnt, at most."""


class HeldOut(NamedTuple):
    """Cases that the model is not trained on."""

    cases: Sequence[Case]
    """Complete ones, whose images are withheld in turn and predicted."""
    prepared: Sequence[TrainingCase]
    """The same, as training reads them."""


class Validation:
    """Called with a step and the weights; its record goes into the run's log.

    Args:
        data: what the model is trained on.
        folder: where the pictures go.
    """

    def __init__(
        self,
        config: Config,
        data: TrainingData,
        held_out: HeldOut | None,
        accelerator: Accelerator,
        folder: Path,
        precision: Precision,
    ):
        self.config, self.accelerator, self.folder = config, accelerator, folder
        self.precision = precision
        self.cases = held_out.cases if held_out else []
        self.overfit = bool(data.overfit)
        most = _OVERFIT_EVERY if self.overfit else config.training.validate_every
        self.every = min(most, config.training.validate_every)
        plain = TrainingData(data.sources, config, overfit=data.overfit, plain=True)
        self.fitted = _probes(plain, _PROBES)
        self.looked_at = self.fitted if data.overfit else _probes(plain, _LOOKED_AT)
        self.unseen: list[Sample] = []
        if held_out:
            source = Source("held out", held_out.prepared)
            self.unseen = _probes(TrainingData([source], config, plain=True), _PROBES)
        every = config.process.timesteps(config.training.timesteps)[:-1]
        indices = np.linspace(0, len(every) - 1, min(_TIMES, len(every))).round().astype(int)
        self.times = [every[i] for i in indices]

    @property
    def due_at_the_end(self) -> bool:
        """Whether the last step is followed by one, whatever its number."""
        return bool(self.cases) or self.overfit

    def knows_by_heart(self, record: Mapping[str, Any]) -> bool:
        """Whether there is nothing left to see in an overfit run."""
        return self.overfit and all(s["psnr"] >= BY_HEART_DB for s in record["scores"])

    def statistics(self) -> dict[str, Any]:
        """How the training data look to the network: for ``data.json``."""
        config = self.config
        normalization = NORMALIZATIONS[config.images.normalization]
        values: dict[Modality, list[Tensor]] = {m: [] for m in config.modalities}
        energies = []
        for sample in self.looked_at:
            brain = (sample.images != normalization.background).any(dim=0)
            there = sample.given.clone()
            there[sample.target] = True
            for i, modality in enumerate(config.modalities):
                if there[i]:
                    values[modality].append(sample.images[i][brain])
            energies.append(_energy(config, sample.images[sample.target][None, None]))
        inside = {m: torch.cat(each) for m, each in values.items() if each}
        low, high = normalization.low, normalization.high
        return {
            "clipped": {
                m: float(((v <= low) | (v >= high)).float().mean()) for m, v in inside.items()
            },
            "mean": {m: float(v.mean()) for m, v in inside.items()},
            "deviation": {m: float(v.std()) for m, v in inside.items()},
            "energy": torch.stack(energies).mean(dim=0).tolist(),
            "held_out": len(self.cases),
        }

    def __call__(
        self,
        step: int,
        denoiser: Denoiser,
        average: Denoiser,
        priors: Mapping[Modality, ScalePrior],
    ) -> dict[str, Any]:
        """Measure the raw and the average weights.

        Several processes share the held-out cases out; the record is complete on the first one.
        """
        average.eval()
        model = Model(self.config, average, priors, self.folder.parent, "")
        engine = Engine(model, device=str(self.accelerator.device), precision=self.precision)
        settings = self._settings(engine)
        fitted = self._errors(average, engine, self.fitted)
        unseen = self._errors(average, engine, self.unseen) if self.unseen else None
        denoiser.eval()
        raw = self._errors(denoiser, engine, self.unseen or self.fitted)
        denoiser.train()
        energies, patches = [], []
        for number, sample in enumerate(self.unseen or self.fitted):
            image, truth = self._sample(engine, settings, sample, number)
            energies.append((_energy(self.config, image), _energy(self.config, truth)))
            patches.append((image, truth))
        samples, data = (torch.stack(each).mean(dim=0) for each in zip(*energies, strict=True))
        scores = [self._patch_score(*patch) for patch in patches] if self.overfit else []
        mine = self.cases[self.accelerator.process_index :: self.accelerator.num_processes]
        scored = [score for case in mine for score in self._scores(case, model, settings, step)]
        return {
            "step": step,
            "times": self.times,
            "held_out": unseen,
            "fitted": fitted,
            "raw": raw,
            "trivial": self._trivial(),
            "energy": {"samples": samples.tolist(), "data": data.tolist()},
            "scores": [*scores, *gather_object(scored)],
        }

    def _settings(self, engine: Engine) -> Sampling:
        """How the model samples, in no more than ``validation_steps`` steps."""
        own, most = engine.settings(), self.config.training.validation_steps
        if len(self.config.process.timesteps(own.steps, own.spacing)) - 1 <= most:
            return own
        for steps in range(most, 1, -1):
            with suppress(InputError):  # strides do not make any number
                return engine.settings("ddim", steps)
        return engine.settings("ddim", 1)

    @torch.inference_mode()
    def _errors(self, denoiser: Denoiser, engine: Engine, samples: Sequence[Sample]) -> list[float]:
        """Mean squared error of the estimate of x_0 at each of the times."""
        device = self.accelerator.device
        errors = []
        for time in self.times:
            of_each = []
            for number, (image, cond, label) in enumerate(self._inputs(samples)):
                x_0 = self.config.transform.encode(image)
                noise = noise_stream(x_0.shape, number, device)()
                t = torch.tensor([time], device=device)
                x_t = self.config.process.mix(x_0, denoiser.start(noise, cond), noise, t)
                with torch.autocast(device.type, torch.bfloat16, enabled=engine.bf16):
                    output = denoiser(x_t, t, cond, label)
                estimate = denoiser.x_0(output.float(), x_t, t, cond)
                of_each.append(float(band_loss(estimate, x_0).mean()))
            errors.append(float(np.mean(of_each)))
        return errors

    def _trivial(self) -> list[float]:
        """The error of the mean of the conditions, or of zero, at each of the times."""
        config = self.config
        errors = []
        for image, cond, _ in self._inputs(self.unseen or self.fitted):
            x_0 = config.transform.encode(image)
            guess = torch.zeros_like(x_0)
            if cond is not None:
                guess = mean_of_conditions(
                    cond, config.transform.channels, availability=config.conditioning == "any"
                )
            errors.append(float(band_loss(guess, x_0).mean()))
        return [float(np.mean(errors))] * len(self.times)

    def _inputs(
        self, samples: Sequence[Sample]
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        for sample in samples:
            yield inputs(self.config, default_collate([sample]), self.accelerator.device)

    def _sample(
        self, engine: Engine, settings: Sampling, sample: Sample, seed: int
    ) -> tuple[Tensor, Tensor]:
        """A chain under the conditions of a sample, and its truth: images (1, 1, X, Y, Z)."""
        ((truth, cond, label),) = self._inputs([sample])
        shape = self.config.transform.encode(truth).shape
        chain = engine.run(
            settings,
            noise_stream(shape, seed, engine.device),
            cond=cond,
            label=None if label is None else int(label),
        )
        return chain.image.cpu(), truth.cpu()

    def _patch_score(self, image: Tensor, truth: Tensor) -> dict[str, Any]:
        """As ``compare``, of a block of a training case: what an overfit run has to reach."""
        true, predicted = truth[0, 0].numpy(), image[0, 0].numpy()
        brain = true != NORMALIZATIONS[self.config.images.normalization].background
        aligned = Aligned.of(predicted, true, brain, rising=True)
        pair = (aligned.prediction, aligned.truth, aligned.brain)
        figures = {"psnr": psnr(*pair), "ssim": ssim(*pair), "mae": mae(*pair)}
        return {"case": "fitted block", "modality": str(self.config.target), **figures}

    def _scores(
        self, case: Case, model: Model, settings: Sampling, step: int
    ) -> Iterator[dict[str, Any]]:
        """The figures of ``evaluate`` and a picture, for each target of a held-out case."""
        if not self.config.conditional:
            return
        synthesizers = {
            target: Synthesizer(
                model, target, device=str(self.accelerator.device), precision=self.precision
            )
            for target in self.config.targets
        }

        def predict(case: Case, target: Modality) -> Prediction:
            synthesizer = synthesizers[target]
            made = synthesizer(case, sampler=settings.sampler, steps=settings.steps)
            return Prediction.of(made)

        methods = {self.config.name: predict}
        for comparison in compare(case, methods, targets=self.config.targets):
            brain = [score for score in comparison.scores if score.region == "brain"]
            (score,) = (each for each in brain if each.kind == "model")
            floor = max((each for each in brain if each.kind == "floor"), key=lambda s: s.psnr)
            target = comparison.target
            file = self.folder / f"step-{step:08d}-{safe_name(case.id)}-{target}.png"
            write_png(picture(comparison), file, overwrite=True)
            yield {
                "case": case.id,
                "modality": str(target),
                "psnr": score.psnr,
                "ssim": score.ssim,
                "mae": score.mae,
                "floor": floor.method,
                "floor_psnr": floor.psnr,
                "floor_ssim": floor.ssim,
            }


def _probes(data: TrainingData, n: int) -> list[Sample]:
    """Samples of no step of training: in turn of each case, or of what is simulated."""
    cases = data.cases or data.simulated(n)
    seed = data.config.training.seed
    return [
        data.sample(cases[i % len(cases)], np.random.default_rng([seed, i, 0, _OF_PROBES]))
        for i in range(min(n, len(cases)) if data.overfit else n)
    ]


def _energy(config: Config, image: Tensor) -> Tensor:
    """Mean square of each sub-band of an image (1, 1, X, Y, Z)."""
    return config.transform.encode(image).square().mean(dim=(0, 2, 3, 4))
