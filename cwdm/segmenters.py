"""Segmenters by name, and those that are networks which run here.

All networks share one path: the images of a case, with background at 0, are turned to the network's
orientation, resampled to its voxel size and normalized; its scores come back to the case's grid by
linear interpolation, and only there become labels.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.bundle.config_parser import ConfigParser
from monai.inferers.inferer import Inferer, SlidingWindowInferer
from monai.transforms.compose import Compose
from monai.transforms.intensity.array import NormalizeIntensity
from monai.transforms.post.dictionary import Activationsd
from monai.transforms.spatial.dictionary import Orientationd, Spacingd
from monai.transforms.transform import MapTransform, Randomizable
from monai.utils.misc import fall_back_tuple
from monai.utils.type_conversion import convert_to_tensor
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn

from cwdm import external, segnet
from cwdm.case import Case
from cwdm.checkpoints import read_weights
from cwdm.config import Images
from cwdm.engine import Progress
from cwdm.errors import InputError
from cwdm.machine import Precision, choose_bf16, choose_device
from cwdm.modality import SEQUENCES, Modality, find_modality
from cwdm.msnet import CHANNELS, MSNet
from cwdm.preparation import FLIPS, Box, Frame, network_voxels
from cwdm.segmentation import (
    Descriptor,
    Labels,
    Region,
    Segmenter,
    brats_labels,
    check_complete,
    digest,
    find_label,
    find_region,
    from_regions,
    regions,
)
from cwdm.volume import Volume, brain_mask, read_volumes

__all__ = ["DEFAULT", "KINDS", "PROGRAMS", "Network", "check_script", "load"]

DEFAULT = "default"
"""The segmenter that ships with cwdm."""

KINDS = {
    DEFAULT: "",
    "monai-bundle": "FOLDER",
    "nnunet": "FOLDER",
    "onnx": "FILE",
    "torchscript": "FILE",
    "msnet": "FILE",
    "command": "PROGRAM ...",
    "brats": "TASK",
}
"""What a segmenter may be, and what follows the colon."""

PROGRAMS = ("command", "brats")
"""Of those, what is not part of this process, and may want all cores for a case."""

_EXAMPLE = '{"channels": ["t1n", "t1c", "t2w", "t2f"], "regions": ["WT", "TC", "ET"]}'
_READING = {"LoadImaged", "EnsureChannelFirstd", "EnsureTyped", "ToTensord", "ToDeviced"}
"""Steps of a bundle before anything happens to an image; done by cwdm."""
_WRITING = {"Activationsd", "Invertd", "AsDiscreted", "Lambdad", "SaveImaged"} | _READING
"""Steps of a bundle from scores to a file; done by cwdm."""

# Of the code in a TorchScript file. A name is written out in it, unless getattr is told it as text:
# as torch itself writes that, the name is legible, too.
_FILES = re.compile(rb"\b(?:save|from_file)\b")
"""What of torch's operations writes or opens files."""
_FOREIGN = re.compile(rb"(?<![\w.])ops\b(?!\.(?:aten|prim|quantized)\.)[\w.]*")
"""Operations of others, such as torchvision's, which does so as well."""
_GETATTR = re.compile(rb'\bgetattr\([\w.]+, "[^"\\]*"\)')
_UNUSUAL = re.compile(rb"\bgetattr\b")

Model = Callable[[Tensor], Tensor]
Scores = Callable[[Mapping[Modality, Tensor], Progress | None], Tensor]


def load(
    spec: str = DEFAULT,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    timeout_s: float | None = None,
    seed: int = 0,
) -> Segmenter:
    """The segmenter that `spec` stands for, loaded once for many cases.

    - `default`: the network that ships with cwdm; copes with missing sequences.
    - `onnx:FILE`, `torchscript:FILE`: a network, described in FILE with the ending `.json`, see
      `segmentation.Descriptor`. Both run in the precision they were saved in.
    - `monai-bundle:FOLDER`: a MONAI bundle. The weights are tensors only, but its configuration
      names Python that is called: load only folders that you trust.
    - `nnunet:FOLDER`: a results folder of nnU-Net v2. Loads pickles, which can run code: only
      folders that you trust.
    - `msnet:FILE`: the cascade of Wang et al. 2017, see `msnet`.
    - `command:PROGRAM ...`: any program, see `external.Command`.
    - `brats:TASK` or `brats:TASK/ALGORITHM`: winners of BraTS challenges in containers.

    Args:
        timeout_s: for one case; of programs only.
        seed: for segmenters that draw random numbers.

    Raises:
        InputError: an unknown kind, or something that is not what its kind asks for.
        ModuleNotFoundError: an extra of cwdm is not installed.
    """
    kind, colon, rest = spec.partition(":")
    if kind not in KINDS:
        nearest = get_close_matches(kind, KINDS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise InputError(f"{spec}: no such segmenter, expected one of {_kinds()}{hint}")
    if bool(rest) != bool(KINDS[kind]) or (colon and not rest):
        raise InputError(f"{spec}: expected {_written(kind)}")
    path = Path(rest).expanduser()
    match kind:
        case "monai-bundle":
            return _bundle(spec, path, choose_device(device), precision)
        case "nnunet":
            return external.NnUnet(spec, path, choose_device(device))
        case "onnx":
            return _onnx(spec, path, device)
        case "torchscript":
            return _torchscript(spec, path, choose_device(device))
        case "msnet":
            return _msnet(spec, path, device, precision, seed)
        case "command":
            return external.Command(spec, rest, timeout_s=timeout_s)
        case "brats":
            return external.Brats(spec, rest, device)
        case _:
            return _default(spec, choose_device(device), precision)


def _kinds() -> str:
    return ", ".join(_written(kind) for kind in KINDS)


def _written(kind: str) -> str:
    return f"{kind}:{KINDS[kind]}" if KINDS[kind] else kind


class Network:
    """A segmenter that is a network; `scores` is all in which they differ."""

    def __init__(
        self,
        spec: str,
        sha256: str,
        descriptor: Descriptor,
        scores: Scores,
        *,
        partial: bool = False,
    ):
        """
        Args:
            scores: images (X', Y', Z') as the descriptor wants them, background 0 -> scores
                (K, X', Y', Z') of its labels, or probabilities of its regions.
        """
        self.spec = spec
        self.sha256 = sha256
        self.descriptor = descriptor
        self.channels = descriptor.channels
        self.partial = partial
        self._scores = scores

    def __call__(self, case: Case, progress: Progress | None = None) -> Labels:
        """See `segmentation.Segmenter`."""
        check_complete(self, case)
        present = [modality for modality in self.channels if modality in case.images]
        volumes = read_volumes(case, present)
        frame = self._frame(volumes[present[0]])
        images = {
            modality: frame.to_network(np.where(brain_mask(volume), volume.voxels, 0))
            for modality, volume in volumes.items()
        }
        scores = self._scores(images, progress)
        return self._decide(np.stack([frame.from_network(channel) for channel in scores]))

    def _frame(self, like: Volume) -> Frame:
        """How the network sees the grid of a case."""
        shape = like.voxels.shape
        zoom = np.ones(3)
        if self.descriptor.spacing_mm is not None:
            zoom = network_voxels(like.affine, Images(spacing_mm=self.descriptor.spacing_mm))
        size = tuple(max(1, round(n * z)) for n, z in zip(shape, zoom, strict=True))
        return Frame(Box((0, 0, 0), shape), size, FLIPS[self.descriptor.orientation])

    def _decide(self, scores: NDArray[np.float32]) -> Labels:
        """Scores (K, X, Y, Z) on the grid of the case -> labels."""
        if self.descriptor.labels is not None:
            return brats_labels(np.array(self.descriptor.labels)[scores.argmax(0)], self.spec)
        order = self.descriptor.regions or ()
        return from_regions(dict(zip(order, scores > 0.5, strict=True)))


class _Windows:
    """The scores of a network that is shown windows (1, C, x, y, z)."""

    def __init__(
        self,
        spec: str,
        descriptor: Descriptor,
        model: Model,
        device: torch.device,
        *,
        normalize: Callable[[Tensor], Tensor] | None = None,
        inferer: Inferer | None = None,
        bf16: bool = False,
    ):
        self.spec, self.descriptor, self.model, self.device = spec, descriptor, model, device
        self.normalize = normalize or _normalization(descriptor)
        self.inferer = inferer
        self.bf16 = bf16

    @torch.inference_mode()
    def __call__(self, images: Mapping[Modality, Tensor], progress: Progress | None) -> Tensor:
        stacked = torch.stack([images[modality] for modality in self.descriptor.channels])
        image = convert_to_tensor(self.normalize(stacked), track_meta=False)[None].to(self.device)
        size = tuple(image.shape[2:])
        inferer = self.inferer or self._inferer(size)
        model = _counting(self.model, inferer, size, progress) if progress else self.model
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                output = inferer(image, model)
        except RuntimeError as error:
            if "memory" in str(error):  # the command line knows what to say
                raise
            reason = str(error).strip().splitlines()[-1]
            raise InputError(
                f"{self.spec}: failed on an image of shape {tuple(image.shape)}: {reason}"
            ) from error
        expected = (1, len(self.descriptor.labels or self.descriptor.regions or ()), *size)
        if not isinstance(output, Tensor) or tuple(output.shape) != expected:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InputError(f"{self.spec}: put out {found}, expected scores of shape {expected}")
        scores = output[0].float()
        if not scores.isfinite().all():
            raise InputError(f"{self.spec}: put out NaN or infinite scores")
        regions = self.descriptor.regions is not None
        return scores.sigmoid() if regions and self.descriptor.activation == "sigmoid" else scores

    def _inferer(self, size: tuple[int, ...]) -> SlidingWindowInferer:
        """Windows as described; one that holds the padded image if nothing is."""
        multiple = self.descriptor.multiple
        whole = tuple(-(-n // multiple) * multiple for n in size)
        return SlidingWindowInferer(
            self.descriptor.patch or whole, overlap=self.descriptor.overlap, mode="gaussian"
        )


def _normalization(descriptor: Descriptor) -> Callable[[Tensor], Tensor]:
    """Of images (C, X, Y, Z)."""
    nonzero = descriptor.normalization == "nonzero-zscore"
    zscore = NormalizeIntensity(nonzero=nonzero, channel_wise=True)

    def normalize(images: Tensor) -> Tensor:
        return images if descriptor.normalization == "none" else torch.as_tensor(zscore(images))

    return normalize


def _counting(model: Model, inferer: Inferer, size: tuple[int, ...], progress: Progress) -> Model:
    """The model; tells how many of all windows it has seen."""
    total = 1
    if isinstance(inferer, SlidingWindowInferer):
        roi = np.array(fall_back_tuple(inferer.roi_size, size))
        step = np.maximum((roi * (1 - np.array(inferer.overlap))).astype(int), 1)
        total = math.prod((np.ceil(np.maximum(np.array(size) - roi, 0) / step) + 1).astype(int))
    done = 0

    def counted(windows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal done
        output = model(windows, *args, **kwargs)
        done += len(windows)
        progress(min(done, total), total)
        return output

    return counted


def _default(spec: str, device: torch.device, precision: Precision) -> Network:
    """Our own network, see `segnet`."""
    path = Path(str(resources.files("cwdm") / "weights" / "segment-any.safetensors"))
    net = segnet.load(path).to(device)

    def scores(images: Mapping[Modality, Tensor], progress: Progress | None) -> Tensor:
        arrays = {modality: image.numpy() for modality, image in images.items()}
        probabilities = segnet.segment(net, arrays, precision=precision)
        if progress:
            progress(1, 1)
        # a region is only where those around it are, see `segnet.labels_of`
        return torch.from_numpy(np.minimum.accumulate(probabilities))

    descriptor = Descriptor(
        channels=SEQUENCES, spacing_mm=1, regions=segnet.REGIONS, activation="none"
    )
    return Network(spec, digest([path]), descriptor, scores, partial=True)


def _msnet(spec: str, path: Path, device: str, precision: Precision, seed: int) -> Network:
    """The published cascade; its labels pass for certain scores."""
    cascade = MSNet.load(path, str(choose_device(device)), precision)

    def scores(images: Mapping[Modality, Tensor], progress: Progress | None) -> Tensor:
        arrays = {modality: image.numpy() for modality, image in images.items()}
        masks = regions(cascade(arrays, seed=seed, progress=progress))
        return torch.from_numpy(np.stack([masks[region] for region in Region]))

    descriptor = Descriptor(
        channels=CHANNELS, spacing_mm=1, regions=tuple(Region), activation="none"
    )
    return Network(spec, digest([path]), descriptor, scores)


def _described(path: Path) -> tuple[Descriptor, str]:
    """What the JSON file beside a network says, and the digest of all its files."""
    beside = path.with_suffix(".json")
    large = path.with_name(path.name + ".data")  # where ONNX may keep the weights
    sha256 = digest([path, *([large] if large.exists() else [])])
    try:
        text = beside.read_bytes()
    except OSError as error:
        raise InputError(
            f"{beside}: {error.strerror}, expected a description of {path.name} such as {_EXAMPLE}"
        ) from error
    sha256 = hashlib.sha256(sha256.encode() + text).hexdigest()
    return Descriptor.parse(text, beside), sha256


def _torchscript(spec: str, path: Path, device: torch.device) -> Network:
    descriptor, sha256 = _described(path)
    model = _scripted(path, device)
    return Network(spec, sha256, descriptor, _Windows(spec, descriptor, model, device))


def check_script(path: Path) -> None:
    """See that the code in a TorchScript file does nothing but compute, before any of it runs.

    Some of it does when the file is loaded: default arguments and what restores a module's state.

    Raises:
        InputError: it could write or open files.
        RuntimeError: not a readable TorchScript file.
    """
    reader = torch._C.PyTorchFileReader(str(path))  # not zipfile: as torch reads it to load it
    found = []
    for name in reader.get_all_records():
        if name.lower() == "model.json":  # of torch before 1.1, with the code anywhere
            found.append(name)
        elif name.lower().endswith(".py"):
            code = rest = reader.get_record(name)
            nested = 1
            while nested:
                rest, nested = _GETATTR.subn(b"_", rest)
            searched = ((_FILES, code), (_FOREIGN, code), (_UNUSUAL, rest))
            found += [word.decode() for pattern, text in searched for word in pattern.findall(text)]
    if found:
        raise InputError(
            f"{path}: found {found[0]} in its code, expected operations on tensors alone; it is "
            "not loaded because it could write files"
        )


def _scripted(path: Path, device: torch.device) -> Model:
    """A TorchScript file: tensors and operations of torch, no Python."""
    try:
        check_script(path)
        model: nn.Module = torch.jit.load(path, map_location=device)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: not a readable TorchScript file: {reason}") from error
    return model.eval()


def _onnx(spec: str, path: Path, device: str) -> Network:
    import onnxruntime

    descriptor, sha256 = _described(path)
    where = choose_device(device)
    providers: list[Any] = ["CPUExecutionProvider"]
    if where.type == "cuda":
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": where.index or 0}))
        elif device != "auto":
            raise InputError(f"device {device}: expected onnxruntime-gpu, found onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    try:
        session = onnxruntime.InferenceSession(path, options, providers)
    except Exception as error:  # its errors have no base of their own
        raise InputError(f"{path}: not a readable ONNX file: {_last_line(error)}") from error
    inputs = session.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 5 or inputs[0].type != "tensor(float)":
        found = ", ".join(f"{each.type} {each.shape}" for each in inputs)
        raise InputError(f"{path}: takes {found}, expected one tensor(float) (1, C, X, Y, Z)")

    def model(window: Tensor) -> Tensor:
        try:
            scores, *_ = session.run(None, {inputs[0].name: window.numpy()})
        except Exception as error:
            shape = tuple(window.shape)
            raise InputError(
                f"{spec}: failed on a window of shape {shape}: {_last_line(error)}"
            ) from error
        return torch.from_numpy(scores)

    windows = _Windows(spec, descriptor, model, torch.device("cpu"))
    return Network(spec, sha256, descriptor, windows)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _bundle(spec: str, folder: Path, device: torch.device, precision: Precision) -> Network:
    """A MONAI bundle: its network, intensity transforms and inferer are taken as they are; reading
    images, orientation, voxel size and the way back are ours, so is the number of each label.

    One that sets neither orientation nor voxel size gets what BraTS files have: LPS and 1 mm.
    """
    configs = folder / "configs"
    metadata = configs / "metadata.json"
    config = _first(configs / f"inference.{ending}" for ending in ("json", "yaml", "yml"))
    weights = _first(folder / "models" / name for name in ("model.pt", "model.ts"))
    sha256 = digest([metadata, config, weights])
    parser = ConfigParser()
    try:
        parser.read_config(config)
        parser.read_meta(metadata)
    except Exception as error:  # of json or yaml
        raise InputError(f"{configs}: cannot be read, {_last_line(error)}") from error
    parser["bundle_root"] = str(folder)
    if "device" in parser:
        parser["device"] = f"$torch.device('{device}')"
    geometry, normalize = _preprocessing(parser, config)
    try:
        descriptor = Descriptor(
            channels=_inputs(parser, metadata),
            normalization="none",
            activation=_activation(parser, config),
            **geometry,
            **_outputs(parser, metadata),
        )
    except ValidationError as error:
        raise InputError(f"{metadata}: {error.errors()[0]['msg']}") from error
    inferer = _parsed(parser, "inferer", config)
    model = (
        _scripted(weights, device)
        if weights.suffix == ".ts"
        else _network(parser, config, weights).to(device)
    )
    bf16 = weights.suffix != ".ts" and choose_bf16(precision, device)
    windows = _Windows(
        spec, descriptor, model, device, normalize=normalize, inferer=inferer, bf16=bf16
    )
    return Network(spec, sha256, descriptor, windows)


def _first(paths: Iterable[Path]) -> Path:
    """The first that exists."""
    tried = list(paths)
    for path in tried:
        if path.is_file():
            return path
    names = " or ".join(path.name for path in tried)
    raise InputError(f"{tried[0].parent}: no {names}, expected a MONAI bundle")


def _parsed(parser: ConfigParser, key: str, config: Path) -> Any:
    """What a bundle's configuration makes of a key; runs what it names."""
    if key not in parser:
        raise InputError(f"{config}: has no {key}, which a bundle for inference needs")
    try:
        return parser.get_parsed_content(key)
    except Exception as error:  # whatever it calls
        raise InputError(f"{config}: {key}: {_last_line(error)}") from error


def _network(parser: ConfigParser, config: Path, weights: Path) -> nn.Module:
    network = _parsed(parser, "network_def", config)
    if not isinstance(network, nn.Module):
        found = type(network).__name__
        raise InputError(f"{config}: network_def: found a {found}, expected a network")
    try:
        network.load_state_dict(read_weights(weights))
    except RuntimeError as error:
        raise InputError(f"{weights}: does not fit network_def: {_last_line(error)}") from error
    return network.eval().requires_grad_(False)


def _channel_names(parser: ConfigParser, key: str, metadata: Path) -> list[str]:
    """The names in a `channel_def`, in the order of the channels."""
    key = f"network_data_format#{key}#channel_def"
    names = parser.get(f"_meta_#{key}", {})
    if not names or set(names) != {str(channel) for channel in range(len(names))}:
        where = key.replace("#", ".")
        raise InputError(f"{metadata}: {where}: found {names or 'nothing'}, expected all channels")
    return [str(names[str(channel)]) for channel in range(len(names))]


def _inputs(parser: ConfigParser, metadata: Path) -> tuple[Modality, ...]:
    names = _channel_names(parser, "inputs#image", metadata)
    found = [find_modality(name) for name in names]
    channels = tuple(modality for modality in found if modality in SEQUENCES)
    if len(channels) < len(names):
        raise InputError(
            f"{metadata}: input channels are {', '.join(names)}, expected MRI sequences"
        )
    return channels


def _outputs(parser: ConfigParser, metadata: Path) -> dict[str, Any]:
    """`labels` or `regions` of a descriptor."""
    names = _channel_names(parser, "outputs#pred", metadata)
    for kind, find in (("regions", find_region), ("labels", find_label)):
        found = tuple(find(name) for name in names)
        if None not in found:
            return {kind: found}
    raise InputError(
        f"{metadata}: output channels are {', '.join(names)}, expected whole tumor, tumor core and "
        "enhancing tumor, or background, necrosis, edema and enhancing tumor"
    )


def _preprocessing(
    parser: ConfigParser, config: Path
) -> tuple[dict[str, Any], Callable[[Tensor], Tensor]]:
    """`orientation` and `spacing_mm` of a descriptor, and what happens to intensities."""
    geometry: dict[str, Any] = {"orientation": "LPS", "spacing_mm": 1.0}
    intensity = []
    for each in _transforms(parser, "preprocessing", config):
        name = type(each).__name__
        match each:
            case Orientationd() if each.ornt_transform.axcodes in FLIPS:
                geometry["orientation"] = each.ornt_transform.axcodes
            case Spacingd() if len({*each.spacing_transform.pixdim}) == 1:
                geometry["spacing_mm"] = float(each.spacing_transform.pixdim[0])
            case _ if name in _READING:
                pass
            case MapTransform() if (
                type(each).__module__ == "monai.transforms.intensity.dictionary"
                and each.keys == ("image",)
                and not isinstance(each, Randomizable)
            ):
                intensity.append(each)
            case _:
                raise InputError(
                    f"{config}: preprocessing: cwdm does not know what to make of this {name}"
                )

    def normalize(images: Tensor) -> Tensor:
        changed: Tensor = Compose(intensity)({"image": images})["image"]
        return changed

    return geometry, normalize


def _activation(parser: ConfigParser, config: Path) -> Literal["sigmoid", "none"]:
    """Whether the outputs are logits of regions."""
    activation: Literal["sigmoid", "none"] = "none"
    for each in _transforms(parser, "postprocessing", config):
        name = type(each).__name__
        if name not in _WRITING or {*getattr(each, "threshold", ())} - {None, 0.5}:
            raise InputError(
                f"{config}: postprocessing: cwdm does not know what to make of this {name}"
            )
        if isinstance(each, Activationsd) and any(each.sigmoid):
            activation = "sigmoid"
    return activation


def _transforms(parser: ConfigParser, key: str, config: Path) -> tuple[Any, ...]:
    """The single steps of a `Compose`."""
    composed = _parsed(parser, key, config)
    if not isinstance(composed, Compose):
        found = type(composed).__name__
        raise InputError(f"{config}: {key}: found a {found}, expected a Compose")
    return tuple(composed.flatten().transforms)
