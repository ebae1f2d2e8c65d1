"""The command line: what it prints, and that what goes wrong is one line and an exit code."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from integrations import commands
from integrations.commands import main
from integrations.transformers import load_dense


def error_line(arguments: list[str], capsys: pytest.CaptureFixture[str], *, exit_code: int = 1) -> str:
    """Run a command that fails and return its only line."""
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code  # type: ignore[assignment]
    shown = capsys.readouterr()
    assert code == exit_code
    assert shown.out == ""
    [line] = shown.err.splitlines()
    assert line.startswith("edkm: error: ")
    return line


def finetune(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    return ["finetune", "--model", f"{model}", "--data", f"{text}", "--output", f"{output}", *more]


def test_finetune_prints_one_object(
    tiny_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    more = ("--bits", "2", "--steps", "2", "--batch-size", "2", "--checkpoint-interval", "0", "--json")
    assert main(finetune(tiny_model, text, output, *more)) == 0
    shown = capsys.readouterr()
    [line] = shown.out.splitlines()
    result = json.loads(line)
    assert (result["bits"], result["num_steps"], result["output"]) == (2, 2, str(output))
    assert "loss " in shown.err
    assert main(["eval", "--model", str(output), "--text", str(text)]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed.keys() == {
        *("perplexity", "bits_per_byte", "num_tokens", "tokens_per_second"),
        *("bits_per_weight", "disk_bytes"),
    }
    assert int(printed["disk_bytes"]) == result["disk_bytes"]


def test_palettize_and_export(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    arguments = ["palettize", "--model", str(tiny_model), "--output", str(packed), "--bits", "2", "--json"]
    assert main(arguments) == 0
    assert main(["export", "--dense", "--model", str(packed), "--output", str(dense), "--json"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["disk_bytes"] < second["disk_bytes"]
    assert len(load_dense(str(dense)).model.layers[0].mlp.up_proj.weight.unique()) == 4


@pytest.mark.parametrize("command", ["finetune", "eval", "palettize", "export", "demo"])
def test_help_states_the_defaults(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    if command == "finetune":
        for option in ("--steps", "--learning-rate", "--batch-size", "--seed", "--bits", "--dtype"):
            assert option in shown
        assert shown.count("[") > 25
        assert "None" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["finetune"], "the following arguments are required: --model, --data, --output"),
        (["eval", "--model", "x", "--text", "y", "--bits", "3"], "unrecognized arguments: --bits 3"),
        (["finetune", "--steps", "0"], "argument --steps: must be at least 1"),
        (["finetune", "--steps", "-1"], "argument --steps: '-1' is not a whole number"),
        (["finetune", "--seed", str(2**32)], "argument --seed: must be less than 4294967296"),
        (["finetune", "--bits", "three"], "argument --bits: invalid int value: 'three'"),
        (["finetune", "--embedding-bits", "none"], "argument --embedding-bits: 'none' is no number"),
        (["palettize", "--groups", "0"], "argument --groups: must be at least 1"),
        (["finetune", "--context", "1"], "argument --context: must be at least 2"),
        (["finetune", "--distill", "1.5"], "argument --distill: '1.5' is not a number from 0 to 1"),
        (["finetune", "--learning-rate", "nan"], "argument --learning-rate: 'nan' is not a number above 0"),
        (["export", "--model", "x", "--output", "y"], "the following arguments are required: --dense"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_line(arguments, capsys, exit_code=2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--bits", "9"), "DKMConfig.bits is 9: give 1 to 8"),
        (("--bits", "0"), "DKMConfig.bits is 0: give 1 to 8"),
        (("--embedding-bits", "12"), "DKMConfig.embedding_bits is 12: give 1 to 8"),
        (("--device", "nonesuch"), "nonesuch"),
        (("--device", "meta"), "--device meta computes nothing"),
        (("--context", "1000000"), ""),
    ],
)
def test_wrong_values_are_one_line(
    more: tuple[str, ...],
    message: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("x" * (100 if "--device" in more else 10))
    assert message in error_line(finetune(tiny_model, short, tmp_path / "out", *more), capsys)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_one_line(
    tiny_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_dense(str(tiny_model))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    for path in tiny_model.glob("tokenizer*"):
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    output = tmp_path / "out"
    packed = ["palettize", "--model", str(tmp_path / "model"), "--output", str(output)]
    for arguments in (packed, finetune(tmp_path / "model", text, output)):
        assert "up_proj" in error_line(arguments, capsys)
        assert not output.exists()


def test_bad_input_is_one_line_and_leaves_nothing(
    tiny_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, empty, short = tmp_path / "out", tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("too short")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "x"}')
    unarmed = tmp_path / "unarmed"
    unarmed.mkdir()
    (unarmed / "config.json").write_text((tiny_model / "config.json").read_text())
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "nonesuch"}')
    (unknown / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    (unknown / "tokenizer.json").write_text((tiny_model / "tokenizer.json").read_text())
    for model, data, message in [
        (tiny_model, empty, "empty.txt is empty: there is nothing to train on"),
        (tiny_model, rows, "line 1: the field 'text' is missing"),
        (tiny_model, short, "the text has 9 tokens; give at least 62"),
        (tiny_model, tmp_path / "none.txt", "none.txt: No such file"),
        (unarmed, text, "has no weights"),
        (unknown, text, "nonesuch"),
        (tmp_path, text, "has no config.json"),
    ]:
        assert message in error_line(finetune(model, data, output), capsys)
        assert not output.exists()
    for data, message in [
        (empty, "is empty: there is nothing to score"),
        (short, "one block of 31 is the least"),
    ]:
        assert message in error_line(["eval", "--model", str(tiny_model), "--text", str(data)], capsys)


@pytest.mark.parametrize("command", ["finetune", "palettize", "export"])
def test_an_output_that_is_not_empty_is_refused(
    command: str, tiny_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [command, "--model", str(tiny_model), "--output", str(tmp_path)]
    arguments += {"finetune": ["--data", str(text)], "export": ["--dense"]}.get(command, [])
    assert "is not empty: name another --output" in error_line(arguments, capsys)
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize("name", ["transformers", "tqdm"])
def test_a_missing_extra_is_named(
    name: str, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in [module for module in sys.modules if module.startswith("integrations.")]:
        if module not in ("integrations.commands", "integrations.errors", "integrations.recipe"):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    line = error_line(finetune(Path("x"), text, Path("y")), capsys)
    assert f"{name} is missing, which the commands need: pip install 'edkm[llama]'" in line


def test_a_result_is_for_reading(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    loss = {"soft": 2.6468976, "snapped": 11.30479}
    result = {"output": "out", "loss": loss, "num_rows": 123456, "bits": None}
    monkeypatch.setattr(commands, "_eval", lambda _options: result)
    assert main(["eval", "--model", "m", "--text", "t"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "output    out",
        "loss      soft 2.6469, snapped 11.305",
        "num_rows  123456",
        "bits      None",
    ]


def test_the_demo_ends_with_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"perplexity": 1.5, "disk_bytes": 2**20, "saved_bytes": 2**21, "peak_held_bytes": 2**19}
    cost = {"saved_bytes": 1, "peak_held_bytes": 1, "seconds": 0.1}
    result = {
        "rows": {"base": row},
        "clustering": {"plain DKM": cost},
        "files": ["edkm-demo/a"],
        "seconds": 61.2,
    }
    monkeypatch.setattr(commands, "_demo", lambda _options: result)
    assert main(["demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["base", "1.500", "1.00", "MiB", "2.00", "MiB", "0.50", "MiB"]
    assert lines[4].split() == ["plain", "DKM", "0.00", "MiB", "0.00", "MiB", "0.100"]
    assert lines[6:] == ["written in 61 s:", "  edkm-demo/a"]
    assert main(["demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result


def test_a_missing_module_of_another_kind_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_options: object) -> None:
        raise ModuleNotFoundError("no such thing", name="elsewhere")

    monkeypatch.setattr(commands, "_demo", fail)
    with pytest.raises(ModuleNotFoundError):
        main(["demo"])


def test_ctrl_c_outside_of_training_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_demo", interrupt)
    assert error_line(["demo"], capsys, exit_code=130) == "edkm: error: interrupted"


def started(arguments: list[str], checkpoints: Path, root: Path) -> subprocess.Popen[str]:
    """Start `python -m edkm` and wait for its first checkpoint."""
    run = subprocess.Popen(
        [sys.executable, "-m", "edkm", *arguments],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (checkpoints / "last.json").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    return run


def test_a_killed_and_then_terminated_run_goes_on(
    tiny_model: Path, text: Path, tmp_path: Path, root: Path
) -> None:
    output = tmp_path / "out"
    arguments = finetune(
        tiny_model, text, output, "--steps", "100000", "--batch-size", "1", "--checkpoint-interval", "1"
    )
    run = started(arguments, output / "checkpoints", root)
    run.kill()
    run.communicate()
    last = json.loads((output / "checkpoints" / "last.json").read_text())["checkpoint"]
    killed_at = int(last.removeprefix("step-"))

    run = started([*arguments, "--resume"], output / "checkpoints", root)
    while json.loads((output / "checkpoints" / "last.json").read_text())["checkpoint"] == last:
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    shown, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM
    assert shown == ""
    final = errors.splitlines()[-1]
    assert final.startswith("edkm: error: interrupted after step ")
    assert int(final.split()[5]) > killed_at
    assert sorted(path.name for path in output.iterdir()) == ["checkpoints"]
    assert not list((output / "checkpoints").glob(".partial-*"))


def test_the_door_and_the_script_are_the_same() -> None:
    assert importlib.import_module("edkm.__main__").main is main
