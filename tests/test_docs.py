"""The documents: what they say to type works, what they promise is there, and nothing is left out.

Blocks run in order, in a folder that holds what the text takes for granted (`workplace`):

    ```sh       commands that succeed             ```console   `$ command`, then its error, exactly
    ```python   runs, gives what `# 1.23` says     ```toml      a configuration, saved as `# name`
    ```json     a record; or what `network.pt` is  ```text      only to read

At the end, every path in inline code has to be there, in that folder or in the repository.
"""

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from scipy import ndimage

from cwdm.cli.main import COMMANDS, cwdm
from cwdm.config import Config
from cwdm.modality import ALIASES, SEQUENCES, Modality
from cwdm.model import build_denoiser
from cwdm.provenance import Provenance

ROOT = Path(__file__).parents[1]
GUIDES = {name: ROOT / "docs" / f"{name}.md" for name in COMMANDS}
GUIDES["models"] = ROOT / "docs" / "published-models.md"
GUIDES["calibrate"] = ROOT / "docs" / "uncertainty.md"
EXECUTED = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("cwdm/weights/*.md")]
SLOW = {"simulate.md"}  # simulates at full size
LANGUAGES = {"sh", "python", "console", "toml", "json", "text"}
SHAPE = (32, 30, 28)

Workplace = Callable[[], Path]


class Block(NamedTuple):
    """A fenced block of a document."""

    language: str
    text: str
    where: str
    """Document and line, for messages."""


def blocks(document: Path) -> Iterator[Block]:
    text = document.read_text("utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(match[1], match[2], f"{document.name}, line {line}")


def prose(document: Path) -> str:
    """The document without its blocks."""
    return re.sub(r"^```.*?^```$", "", document.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(
    make_image: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The folder in which the documents play, with small cases; the working directory."""
    all_four = SEQUENCES

    def write(folder: str, number: int, modalities: tuple[Modality, ...]) -> None:
        case_id = f"BraTS-GLI-{number:05d}-000"
        images, labels = patient(number)
        for modality in modalities:
            make_image(f"{folder}/{case_id}-{modality}.nii.gz", voxels=images[modality])
        if modalities == all_four:
            make_image(f"{folder}/{case_id}-seg.nii.gz", voxels=labels)

    write("case", 0, all_four[:3])
    for number in (1, 2, 3):
        write(f"cases/BraTS-GLI-{number:05d}-000", number, all_four)
    for number in (4, 5):
        write(f"held-out/BraTS-GLI-{number:05d}-000", number, all_four)
        rough = ndimage.uniform_filter(patient(number)[0][Modality.T2F], 3)
        make_image(f"predictions/BraTS-GLI-{number:05d}-000-t2f.nii.gz", voxels=rough)
    for number, there in ((21, all_four[:3]), (22, all_four[1:]), (23, all_four)):
        write(f"cohort/BraTS-GLI-{number:05d}-000", number, there)
    write("more-cases/BraTS-GLI-00006-000", 6, all_four)
    network = torch.jit.script(torch.nn.Conv3d(4, 3, 1))
    torch.jit.save(network, tmp_path / "network.pt")
    make_image("labelmaps/brain.nii.gz", voxels=label_map())
    layouts(make_image, tmp_path)

    published(tmp_path / "published" / "brats_t2f_1200000.pt", "cwdm-t2f")
    published(tmp_path / "published" / "brats3dimage120000.pt", "fastwdm-inpainting")

    write("only-flair", 7, (Modality.T2F,))
    write("truncated", 8, all_four[:3])
    broken = tmp_path / "truncated" / "BraTS-GLI-00008-000-t1c.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-2000])
    write("two-grids", 9, all_four[:2])
    voxels, affine = patient(9)[0][Modality.T2W], np.diag([-1.0, -1.0, 1.2, 1.0])
    make_image("two-grids/BraTS-GLI-00009-000-t2w.nii.gz", voxels=voxels, affine=affine)
    write("twice", 10, all_four[:3])
    make_image("twice/BraTS-GLI-00010-000_t2.nii.gz")
    monkeypatch.setattr("cwdm.floors.BOOSTING_ROUNDS", 20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def layouts(make_image: Callable[..., Path], folder: Path) -> None:
    """A case as nnU-Net has it, one in BIDS, and one in a table."""
    images, labels = patient(11)
    for channel, modality in enumerate(SEQUENCES):
        path = f"nnunet/imagesTr/BRATS_001_{channel:04d}.nii.gz"
        make_image(path, voxels=images[modality])
    make_image("nnunet/labelsTr/BRATS_001.nii.gz", voxels=labels)
    names = {"channel_names": {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}}
    (folder / "nnunet" / "dataset.json").write_text(json.dumps(names))
    suffixes = {Modality.T1N: "T1w", Modality.T1C: "ce-gadolinium_T1w", Modality.T2F: "FLAIR"}
    for modality, suffix in suffixes.items():
        path = f"bids/sub-01/anat/sub-01_{suffix}.nii.gz"
        make_image(path, voxels=patient(12)[0][modality])
    files = {Modality.T1N: "pre", Modality.T1C: "gd", Modality.T2F: "flair"}
    for modality, name in files.items():
        make_image(f"images/anna_{name}.nii.gz", voxels=patient(13)[0][modality])
    table = "id,t1,t1ce,t2,flair,seg\nanna,{pre},{gd},,{flair},\n"
    paths = {name: f"images/anna_{name}.nii.gz" for name in files.values()}
    (folder / "cases.csv").write_text(table.format(**paths))


def published(path: Path, preset: str) -> None:
    """A checkpoint as published, of a network that is small and knows nothing."""
    config = Config.read(preset)
    small = replace(config.network, channels=8, groups=4, multipliers=(1, 2), res_blocks=1)
    weights = build_denoiser(replace(config, network=small)).backbone.state_dict()
    path.parent.mkdir(exist_ok=True)
    torch.save(weights, path)


def patient(seed: int) -> tuple[dict[Modality, NDArray[np.int16]], NDArray[np.uint8]]:
    """Four images (X, Y, Z) of one small smooth brain, and labels of a tumor in it."""
    rng = np.random.default_rng(seed)
    center = (np.array(SHAPE).reshape(3, 1, 1, 1) - 1) / 2
    brain = (((np.indices(SHAPE) - center) / (center - 1)) ** 2).sum(axis=0) < 1
    tissue = ndimage.gaussian_filter(rng.normal(size=SHAPE), 1.5)
    tissue /= tissue.std()
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[10:18, 12:20, 10:16], labels[12:15, 14:17, 11:14] = 2, 3
    signals = {
        Modality.T1N: 500 + 60 * tissue,
        Modality.T1C: 520 + 60 * tissue + 250 * (labels == 3),
        Modality.T2W: 700 - 120 * tissue + 150 * (labels > 0),
        Modality.T2F: 450 - 50 * tissue + 10 * tissue**2 + 200 * (labels > 0),
    }
    noisy = {m: (s + 10 * rng.normal(size=SHAPE)).clip(1) for m, s in signals.items()}
    return {m: np.where(brain, s, 0).astype(np.int16) for m, s in noisy.items()}, labels


def label_map() -> NDArray[np.uint8]:
    """A head of 2 mm and more made of spheres, with FreeSurfer's numbers."""
    radius = np.sqrt(((np.indices((150, 150, 150)) - 74.5) ** 2).sum(axis=0))
    labels = np.select([radius < 10, radius < 50, radius < 60], [4, 2, 3], 0)
    return labels.astype(np.uint8)


def run(line: str) -> Result:
    """A command line of a document, in this process."""
    program, *words = shlex.split(line, comments=True)
    assert program == "cwdm", f"{line!r}: the documents only run cwdm"
    return CliRunner().invoke(cwdm, words)


def commands(text: str) -> list[str]:
    """The lines of a block; a backslash continues one."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("document", EXECUTED, ids=lambda document: document.name)
def test_every_block_says_what_it_is(document: Path) -> None:
    assert document.read_text("utf-8").count("```") == 2 * len(list(blocks(document)))
    for block in blocks(document):
        assert block.language in LANGUAGES, block.where


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(path, marks=pytest.mark.slow if path.name in SLOW else (), id=path.name)
        for path in EXECUTED
    ],
)
def test_a_document_works_as_written(document: Path, workplace: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(document):
        if block.language == "sh":
            for line in commands(block.text):
                result = run(line)
                assert result.exit_code == 0, (block.where, line, result.output)
        elif block.language == "console":
            for step in re.findall(r"^\$ (.*(?:\n(?!\$ ).*)*)", block.text, re.MULTILINE):
                line, *expected = step.strip().splitlines()
                result = run(line)
                said = [each for each in result.stderr.splitlines() if "cwdm: error:" in each]
                assert (said, result.exit_code) == (expected, 2), (block.where, line)
        elif block.language == "json" and '"channels"' in block.text:
            (workplace / "network.json").write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, block.where, "exec"), names)
            for value, said in re.findall(r"^(\S.*\S)  # (\d+\.\d+)\b", block.text, re.MULTILINE):
                assert eval(value, names) == pytest.approx(float(said), abs=0.005), value
        elif block.language == "toml":
            Config.parse(tomllib.loads(block.text), block.where)
            (workplace / block.text.split()[1]).write_text(block.text)
    for path in promised(document):
        pattern = re.sub(r"<\w+>", "*", path).rstrip("/")
        there = [*workplace.glob(pattern), *ROOT.glob(pattern)]
        assert there, f"{document.name}: nothing is at {path}"


def promised(document: Path) -> list[str]:
    """Paths in inline code, which have a slash; `<id>` and the like stand for anything."""
    code = re.findall(r"`([^`\n]+/[^`\n]*)`", prose(document))
    return [each for each in code if re.fullmatch(r"[\w./<>-]+", each)]


def test_the_example_of_a_record_has_the_fields_of_a_record() -> None:
    (block,) = [each for each in blocks(GUIDES["synthesize"]) if each.language == "json"]
    example = json.loads(block.text)
    assert list(example) == [field.name for field in fields(Provenance)]
    for field in fields(Provenance):  # those with a default say the same
        if isinstance(field.default, (str, bool)):
            assert example[field.name] == field.default


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_guide_that_the_readme_links_to(name: str) -> None:
    assert f"(docs/{GUIDES[name].name})" in (ROOT / "README.md").read_text("utf-8")
    assert re.search(rf"cwdm {name} .*--", GUIDES[name].read_text("utf-8"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_the_guide_of_its_command(name: str) -> None:
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", GUIDES[name].read_text("utf-8")))
    assert options(name) <= mentioned


@pytest.mark.parametrize("document", EXECUTED, ids=lambda document: document.name)
def test_no_document_names_an_option_that_does_not_exist(document: Path) -> None:
    everything = {"--debug", "--help", "--version"}.union(*map(options, COMMANDS))
    launchers = r"^(accelerate launch|torchrun) .* -m cwdm\.cli"  # with options of their own
    text = re.sub(launchers, "cwdm", document.read_text("utf-8"), flags=re.MULTILINE)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) <= everything


def options(name: str) -> set[str]:
    """Every option of a command and of the commands below it."""
    command = cwdm.get_command(click.Context(cwdm), name)
    assert command is not None
    below = command.commands.values() if isinstance(command, click.Group) else ()
    parameters = [parameter for each in (command, *below) for parameter in each.params]
    words = (word for each in parameters for word in (*each.opts, *each.secondary_opts))
    return {word for word in words if word[:2] == "--"}


def test_every_name_of_a_modality_is_in_the_guide() -> None:
    text = GUIDES["synthesize"].read_text("utf-8")
    for alias in (alias for sequence in SEQUENCES for alias in ALIASES[sequence]):
        assert f"`{alias}`" in text


@pytest.mark.parametrize("document", LINKING, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8")):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path):  # another site
            continue
        target = document.parent / path if path else document
        assert target.exists(), f"{document.name}: {link}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, f"{document.name}: {link}"


def settings(kind: type, section: str = "") -> Iterator[tuple[str, str, str]]:
    """(section, key, default as TOML) of a configuration and everything in it."""
    for field in fields(kind):
        if is_dataclass(field.default):
            inner = f"{section}.{field.name}".strip(".")
            yield from settings(type(field.default), inner)
        else:
            yield section, field.name, toml(field.default)


def toml(value: Any) -> str:
    """A default as the guide shows it: TOML, `-` for none."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, int | float | str):  # bool is an int
        return json.dumps(value)
    return "-"


@pytest.mark.parametrize(("section", "key", "default"), list(settings(Config)))
def test_every_setting_is_in_the_guide_to_training(section: str, key: str, default: str) -> None:
    text = GUIDES["train"].read_text("utf-8")
    if section:
        assert f"`[{section}]`" in text
        text = text.split(f"`[{section}]`", 1)[1]
    row = re.search(rf"^\| `{key}` \| (.*?) \|", text, re.MULTILINE)
    assert row, f"no row for {key} in [{section}]"
    said = row[1].strip("`")
    assert said == default or json.loads(said) == json.loads(default)
