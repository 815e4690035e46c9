"""The scripts, with the arguments that users give them."""

import ast
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script(tmp_path, monkeypatch, scripts_on_path):
    """Runs a script in this process, in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")

    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_every_option_has_a_help_line(path):
    source = path.read_text("utf-8")
    added = [
        call
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) in ("add", "parser.add_argument")
        and ast.unparse(call.args[0]).startswith("'-")
    ]
    assert added
    without = [c for c in added if "help" not in [keyword.arg for keyword in c.keywords]]
    assert [ast.unparse(call.args[0]) for call in without] == []


def test_draw_stages_writes_a_picture(tmp_path, script):
    script("draw_stages.py", "--output", "a/stages.png")
    with Image.open(tmp_path / "a" / "stages.png") as picture:
        assert picture.width > 500


def test_benchmark_data_writes_its_table(tmp_path, small_camvid, script):
    marks = "<!-- data benchmark: written by a script -->", "<!-- end of data benchmark -->"
    (tmp_path / "README.md").write_text("\n".join(["before", *marks, "after"]))
    small = ("--size", 64, 128, "--crop", 32, 64, "--count", 2, "--rounds", 2)
    files = ("--output", "new/data.json", "--readme", "README.md")
    script("benchmark_data.py", *small, *files, "--camvid", small_camvid)
    record = json.loads((tmp_path / "new" / "data.json").read_text())
    assert len(record["ms"]) == 2
    for rows in record["ms"].values():
        assert list(rows)[1:] == ["resize, then crop", "crop, then resize", "cached"]
        assert all(0 < ms["min"] <= ms["median"] <= ms["max"] for ms in rows.values())
    table = (tmp_path / "README.md").read_text()
    assert "| PNG 64x128, crop 32x64 | cached |" in table
    assert table.count("1.00x") >= 2


@pytest.mark.slow
def test_benchmark_efficiency_writes_everything(tmp_path, script):
    marks = "<!-- efficiency: written by a script -->", "<!-- end of efficiency -->"
    (tmp_path / "README.md").write_text("\n".join(["before", *marks, "after"]))
    short = [line.replace("efficiency", "efficiency ratios") for line in marks]
    (tmp_path / "short.md").write_text("\n".join(["before", *short, "after"]))
    small = ("--size", 9, 8, "--train", "--rounds", 1, "--forms", "direct")
    only = ("--only", "ISA", "ISA, plain formulation", "dense attention")
    files = ("--output", "new/efficiency", "--pages", "README.md", "short.md")
    # The second run adds to the first, which measures less: many CPUs emulate bfloat16.
    first = ("--dtype", "bfloat16", "--warmup", 0, "--growth", *only[:2])
    second = ("--dtype", "float32", "--growth", 8, 12, *only)
    for more in (first, second):
        script("benchmark_efficiency.py", *small, *more, *files)
    folder = tmp_path / "new" / "efficiency"
    names = [
        "efficiency.json",
        "efficiency.md",
        "growth.csv",
        "growth.png",
        "heads.csv",
        "heads.png",
    ]
    assert sorted(path.name for path in folder.iterdir()) == names
    rows = json.loads((folder / "efficiency.json").read_text())["heads"]
    assert [(row["dtype"], row["mode"], row["head"]) for row in rows] == [
        (dtype, mode, head)
        for dtype, heads in (("bfloat16", only[1:2]), ("float32", only[1:]))
        for mode in ("inference", "training")
        for head in heads
    ]
    assert all(row["min"] <= row["median"] <= row["max"] for row in rows)
    assert all((row["saved_mib"] or 0) > 0 for row in rows if row["mode"] == "training")
    median = {(row["dtype"], row["mode"], row["head"]): row["median"] for row in rows}
    ratio = median["float32", "training", only[2]] / median["float32", "training", "ISA"]
    kept = {row["head"]: row["saved_mib"] for row in rows[-3:]}
    share = kept["ISA"] / kept[only[2]]
    assert (
        f"| ISA, plain formulation | direct | default | float32 | training | {ratio:.2f}x "
        f"| {ratio:.2f}x | {share:.2f} |"
    ) in (folder / "efficiency.md").read_text()
    text = (tmp_path / "README.md").read_text()
    assert (
        f"| ISA, plain formulation | direct | training | float32 | {ratio:.2f}x ({ratio:.2f} to "
        f"{ratio:.2f}) | {share:.2f} |"
    ) in text
    assert "ISA with windows of 8x8): those of ISA with N^" in text
    lines = (tmp_path / "short.md").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("| ISA, plain formulation, float32 |")]
    assert line.endswith(f" | {ratio:.2f}x | {100 * share:.0f} % |")
    # Without anything to measure: the same tables, from the record.
    (tmp_path / "README.md").write_text("\n".join(["before", *marks, "after"]))
    script("benchmark_efficiency.py", "--sizes", "--growth", *files)
    assert (tmp_path / "README.md").read_text() == text


def test_ratios_are_means_over_the_sizes_that_both_were_measured_at(scripts_on_path):
    from benchmarking.tables import ratio_summary

    row = {"form": "direct", "dtype": "float32", "mode": "training"}
    medians = {  # (memory by, head, size): ms
        ("default", "ISA", "64x64"): 1.0,
        ("default", "ISA", "97x97"): 2.0,
        ("default", "ISA", "128x128"): 3.0,
        ("default", "dense attention", "64x64"): 2.0,
        ("default", "dense attention", "97x97"): 16.0,
        ("jemalloc", "ISA", "64x64"): 1.0,
        ("jemalloc", "dense attention", "64x64"): 3.0,
    }
    saved = {"ISA": 3.0, "dense attention": 12.0}
    rows = [
        {**row, "heap": heap, "head": head, "size": size, "median": ms, "saved_mib": saved[head]}
        for (heap, head, size), ms in medians.items()
    ]
    assert ratio_summary(rows).splitlines() == [
        "| ISA against | form | mode | dtype | memory by default | memory by jemalloc | kept |",
        "|---|---|---|---|---:|---:|---:|",
        "| dense attention | direct | training | float32 | 4.00x (2.00 to 8.00) "
        "| 3.00x (3.00 to 3.00) | 0.25 |",
    ]


def test_growth_is_that_of_one_dtype_and_one_way_of_serving_memory(scripts_on_path):
    from benchmarking.tables import exponents

    rows = [
        {"heap": heap, "dtype": dtype, "kind": "ISA", "size": size, "median": ms, "peak_mib": mib}
        for heap, dtype, size, ms, mib in (
            ("default", "float32", 32, 9.0, 1.0),
            ("default", "float32", 64, 9.0, 1.0),
            ("jemalloc", "bfloat16", 32, 9.0, 1.0),
            ("jemalloc", "float32", 32, 1.0, 1.0),
            ("jemalloc", "float32", 64, 8.0, 4.0),  # positions times 4
        )
    ]
    assert exponents(rows) == (
        "Time and memory of the attention alone grow with the number N of positions (float32, "
        "memory by jemalloc, ISA with windows of 8x8): those of ISA with N^1.50 and N^1.00 (edges "
        "32 to 64)."
    )


def test_networks_stand_in_a_grid_of_sizes(scripts_on_path):
    from benchmarking.tables import network_grid

    row = {"heap": "default", "dtype": "float32", "batch": 1, "peak_mib": 9.6}
    rows = [
        {**row, "network": network, "size": size, "mode": mode, "images_per_s": speed}
        for network, size, mode, speed in (
            ("small", "97x97", "inference", 4.0),
            ("small", "128x128", "inference", 2.0),
            ("large", "128x128", "inference", 1.0),
            ("small", "97x97", "training", 0.5),
        )
    ]
    inference, training = network_grid(rows).split("\n\nImages/s")
    assert inference.splitlines()[2:] == [
        "| network (reduced form) | 97x97 | 128x128 |",
        "|---|---:|---:|",
        "| small | 4.00 (10 MiB) | 2.00 (10 MiB) |",
        "| large | - | 1.00 (10 MiB) |",
    ]
    assert training.splitlines()[-1] == "| small | 0.50 (10 MiB) |"


def test_tables_of_benchmarks_in_the_docs_are_those_of_their_records(scripts_on_path, tmp_path):
    from benchmark_data import table
    from benchmarking.record import headline, short_markdown
    from reporting.blocks import has_block, write_block

    heads = json.loads((ROOT / "docs" / "efficiency" / "efficiency.json").read_text("utf-8"))
    data = json.loads((ROOT / "docs" / "benchmark_data.json").read_text("utf-8"))
    for page, name, text in (
        ("README.md", "efficiency ratios", headline(heads)),
        ("docs/efficiency/README.md", "efficiency", short_markdown(heads)),
        (
            "docs/data.md",
            "data benchmark",
            f"{table(data['ms'])}\n\nMeasured on {data['machine']}.",
        ),
    ):
        content = (ROOT / page).read_text("utf-8")
        copy = tmp_path / "page.md"
        copy.write_text(content, "utf-8")
        assert has_block(copy, name)
        write_block(copy, name, text)
        assert copy.read_text("utf-8") == content


def test_benchmark_of_another_machine_is_not_mixed_in(scripts_on_path, tmp_path):
    from benchmarking.record import keep

    row = {"heap": "default", "dtype": "float32", "form": "direct", "mode": "inference"}
    rows = [{**row, "size": size, "head": "ISA", "median": 1.0} for size in ("97x97", "128x128")]
    old = {"machine": "a", "torch": "2", "heads": rows, "growth": [], "networks": []}
    path = tmp_path / "efficiency.json"
    assert keep(path, old) == old
    path.write_text(json.dumps(old))
    new = {**old, "heads": [{**rows[0], "median": 2.0}, {**rows[0], "size": "64x64"}]}
    merged = keep(path, new)["heads"]
    assert [(r["size"], r["median"]) for r in merged] == [
        ("64x64", 1.0),
        ("97x97", 2.0),
        ("128x128", 1.0),
    ]
    with pytest.raises(SystemExit, match=r"another machine, a, not b; give another --output"):
        keep(path, {**new, "machine": "b"})


def test_benchmark_counts_the_published_arithmetic(scripts_on_path):
    # Arithmetic of the authors' code at 128x128 positions, conv3x3 included.
    from benchmark_efficiency import heads
    from benchmarking.measuring import gmacs

    x = torch.empty(1, 2048, 128, 128, device="meta")
    found = {}
    for name, head in heads("reduced").items():
        head = head.eval().to("meta")
        with torch.no_grad():
            found[name] = gmacs(lambda head=head: head(x))
    assert found["ISA"] == pytest.approx(197.3, abs=0.05)
    assert found["ISA, plain formulation"] == pytest.approx(197.3, abs=0.05)
    assert found["dense attention"] == pytest.approx(311.4, abs=0.05)
    assert found["dense attention, SDPA"] == pytest.approx(311.4, abs=0.05)


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_what_is_timed_on_a_gpu_lasts(scripts_on_path, monkeypatch, warmup):
    from benchmarking import measuring

    clock, calls = [0.0], []

    def call():
        clock[0] += 0.0002 if calls else 0.15  # the first one loads kernels
        calls.append(clock[0])

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(measuring.torch.cuda, "synchronize", lambda: None)
    times = measuring.alternate({"a": call}, rounds=3, warmup=warmup, device="cuda")
    assert times["a"] == pytest.approx([0.2] * 3)
    assert len(calls) == 2 + (warmup + 3) * measuring.GPU_SECONDS / 0.0002


def test_whole_networks_are_measured(scripts_on_path, monkeypatch):
    import benchmark_efficiency

    monkeypatch.setattr(benchmark_efficiency, "has_mmsegmentation", lambda: False)
    args = SimpleNamespace(
        backbones=["resnet18"], network_sizes=[32, 40], network_rounds=1, device="cpu",
        dtype=["float32"],
    )  # fmt: skip
    inference, training = benchmark_efficiency.measure_networks(args)
    for row, mode, batch in ((inference, "inference", 1), (training, "training", 2)):
        assert (row["network"], row["size"]) == ("ISANet resnet18", "32x40")
        assert (row["mode"], row["batch"], row["dtype"]) == (mode, batch, "float32")
        assert row["images_per_s"] == pytest.approx(1000 * batch / row["median"])
        assert row["peak_mib"] > 0
    assert training["peak_mib"] > 4 * inference["peak_mib"]  # it keeps its features


def test_every_kind_of_stop_meets_every_number_of_workers(scripts_on_path, monkeypatch, tmp_path):
    import stress_resume

    met = []
    ended = SimpleNamespace(wait=lambda: 0)
    monkeypatch.setattr(
        stress_resume, "start", lambda folder, name, steps, workers: met.append(workers) or ended
    )
    monkeypatch.setattr(stress_resume, "steps_of", lambda process, lines: iter([1, 2]))
    monkeypatch.setattr(stress_resume.random, "randint", lambda low, high: 1)
    kinds = []
    monkeypatch.setattr(stress_resume, "stop", lambda process, kind, part: kinds.append(kind))
    for number in range(9):
        stress_resume.run_until_stopped(tmp_path, 10, number)
    assert len(set(zip(kinds, met, strict=True))) == 9


def test_a_difference_between_two_runs_is_found(scripts_on_path, tmp_path):
    from stress_resume import COMPARED, compare

    def write(name, value, metrics="step,train/loss\n1,0.5\n"):
        content = {}
        for key in COMPARED:
            *path, last = key.split(".")
            part = content
            for step in path:
                part = part.setdefault(step, {})
            part[last] = {"weight": torch.full((2,), value), "list": [1, (2, value)]}
        folder = tmp_path / name / "checkpoints"
        folder.mkdir(parents=True)
        for file in ("last.ckpt", "best.ckpt"):
            torch.save(content, folder / file)
        (tmp_path / name / "metrics.csv").write_text(metrics)
        return tmp_path / name

    one, same = write("one", 1.0), write("same", 1.0)
    assert compare(one, same) == []
    found = compare(one, write("other", 1.0 + 2**-23, "step,train/loss\n1,0.25\n"))
    assert found[-1] == "metrics.csv"
    for file in ("last.ckpt", "best.ckpt"):
        for key in COMPARED:
            assert f"{file}: {key}.weight" in found
            assert f"{file}: {key}.list[1][1]" in found


def test_peak_memory_is_that_of_live_tensors(scripts_on_path):
    from benchmarking.measuring import peak_mib

    x = torch.zeros(2**18)  # 1 MiB

    def call():
        a = x + 1
        b = a + 1
        del a
        c = b + 1  # takes the place of a
        return (c * 2).sum()

    assert peak_mib(call) == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize("name", ["setup.sh", "setup_peer.sh", "quickstart.sh", "test.sh"])
def test_shell_scripts_parse(name):
    done = subprocess.run(["bash", "-n", ROOT / "scripts" / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def make_tools(folder):
    """Makes a folder of the programs that a shell script may find: no uv of this machine."""
    folder.mkdir()
    for name in ("bash", "sh", "basename", "cp", "mkdir"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


def test_the_quick_start_trains_its_config(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    tools = make_tools(tmp_path / "bin")
    (tools / "dirname").symlink_to(shutil.which("dirname"))
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "isanet-pl"):
        (programs / name).write_text(f'#!/bin/sh\necho "$(basename $0) $*" >> "{tmp_path}/log"\n')
        (programs / name).chmod(0o755)
    command = ["bash", tmp_path / "scripts" / "quickstart.sh", "--name", "mine"]
    environment = {**os.environ, "PATH": str(tools), "PYTHON": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, last = (tmp_path / "log").read_text().splitlines()
    *start, config, option, value = last.split()
    assert start == ["isanet-pl", "fit", "--config"]
    assert (ROOT / config).is_file()
    assert (option, value) == ("--name", "mine")


@pytest.mark.parametrize("with_uv", [False, True])
def test_setup_makes_the_environment_once(tmp_path, with_uv):
    # Stand-ins for python and uv write down how they are called and make a .venv.
    tools = make_tools(tmp_path / "bin")
    log = tmp_path / "log"
    make = f'mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo made >> "{log}"'
    note = f'echo "$(basename $0) $*" >> "{log}"'
    fake = f'#!/bin/sh\n{note}\ncase "$*" in *venv*" .venv"*) {make};; esac\n'
    for name in ["python3"] + (["uv"] if with_uv else []):
        (tools / name).write_text(fake)
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": str(tools), "PYTHON": ""}
    code = f"set -euo pipefail; source '{ROOT}/scripts/setup.sh'; install_into_venv '.[dev]'"
    for _ in range(2):
        done = subprocess.run(
            ["bash", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    calls = log.read_text().splitlines()
    assert calls.count("made") == 1
    installs = [call for call in calls if "install" in call and "-e .[dev]" in call]
    assert len(installs) == 2
    assert all(call.startswith("uv pip" if with_uv else "python -m pip") for call in installs)


def test_setup_refuses_an_old_python(tmp_path):
    tools = make_tools(tmp_path / "bin")
    for name in ("python3", "python3.13", "python3.12", "python3.11", "python"):
        (tools / name).write_text("#!/bin/sh\nexit 1\n")
        (tools / name).chmod(0o755)
    environment = {"PATH": str(tools)}
    code = f"set -euo pipefail; source '{ROOT}/scripts/setup.sh'; install_into_venv ."
    done = subprocess.run(
        ["bash", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed" in done.stderr
