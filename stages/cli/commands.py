"""The commands of `sft`: stages, tools and flows, with their options and examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from stages.cli.group import Entry, Group, make_command
from stages.params.engines import ENGINES, SERVED_MODELS
from stages.params.figures import MODELS

STAGE_HELP = {
    "load": "read and check the sources, and set held-out rows apart",
    "format": "render the rows as chats and mark what is trained",
    "pack": "tokenize the chats and pack them into rows of at most pack.max_length tokens",
    "train": "train an adapter or all weights",
    "merge": "merge the adapter into the base model",
    "quantize": "write a smaller copy of the merged model",
    "evaluate": "measure every model on the held-out rows and check the gate",
    "publish": "record the result in MLflow and register the model",
}

SHELLS = ("bash", "zsh", "fish")
COMPLETE = "_SFT_COMPLETE"
"""Environment variable by which a shell asks the command for completions."""

EXIT_CODES = """\b
Exit codes:
  0    success
  1    the work failed, for a reason that the message names
  2    params.yaml or the command line is wrong
  75   SIGTERM stopped a training that has saved a checkpoint
  130  stopped by Ctrl-C; 143: by SIGTERM"""


def _complete_assignment(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the keys of `--set`."""
    if "=" in incomplete:
        return []
    from stages.params.schema import leaf_fields

    return [
        CompletionItem(f"{name}=", help=description)
        for name, description in leaf_fields().items()
        if name.startswith(incomplete)
    ]


def _complete_recipe(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the name of a recipe."""
    from stages.recipes.catalog import recipe_names

    return [CompletionItem(name) for name in recipe_names() if name.startswith(incomplete)]


def _option(*names: str, **attributes: Any) -> click.Option:
    return click.Option(names, **attributes)


def _runs(number: int) -> click.Argument:
    """Return the argument for the names of recorded runs."""

    def check(context: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(names) != number:
            wanted = "one run: its id, name or alias" if number == 1 else "two runs: their ids, names or aliases"
            raise click.UsageError(f"{context.info_name} takes {wanted}; {len(names)} given", context)
        return names

    return click.Argument(["runs"], nargs=-1, metavar=" ".join(["RUN"] * number), callback=check)


ROOT = _option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    metavar="FOLDER",
    help="Folder with params.yaml; by default this folder.",
)
SET = _option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    shell_complete=_complete_assignment,
    help="Replace a value of params.yaml, such as train.learning_rate=3e-4; repeatable. Commands that compute results "
    "or make a params.yaml write it into the file, the others use it for this call only.",
)
JSON = _option("--json", "as_json", is_flag=True, default=None, help="Print one JSON value instead of text.")
FORCE = _option("--force", is_flag=True, default=None, help="Run even if the result is in the cache.")
MODEL = _option("--model", type=click.Choice(MODELS), help="Model to load (default: merged).")
POSITIVE = click.IntRange(min=1)

STAGES: dict[str, Entry] = {
    name: Entry(
        summary,
        f"stages.{name}",
        (
            _option(
                "--alone",
                is_flag=True,
                default=None,
                help="Run this stage alone, without DVC, on what is in outs/ (as `python -m stages` does).",
            ),
            FORCE,
        ),
        (f"sft {name}",),
        f"`sft {name}` brings the stage and all that it reads up to date, as `dvc repro {name}` does.",
        writes_params=True,
    )
    for name, summary in STAGE_HELP.items()
}

TOOLS: dict[str, Entry] = {
    "repro": Entry(
        "check everything, then run what is not up to date",
        "stages.cli.repro",
        (
            click.Argument(["stages"], nargs=-1, type=click.Choice(list(STAGE_HELP)), metavar="[STAGE]..."),
            FORCE,
            _option("--pull", is_flag=True, default=None, help="Fetch missing results from the DVC remote first."),
        ),
        ("sft repro", "sft repro --set train.learning_rate=3e-4 --set train.lora_r=8", "sft repro pack"),
        "Runs `sft check`, restores results that the cache has, runs `dvc repro`, and prints the figures. With stages, "
        "runs these and what they read.",
        writes_params=True,
    ),
    "check": Entry(
        "find mistakes in params.yaml, the data and this machine before a run",
        "stages.tools.check",
        (JSON,),
        ("sft check", "sft check --set pack.max_length=4096 --json"),
    ),
    "preview": Entry(
        "show packed rows token by token, with the trained tokens marked",
        "stages.tools.preview",
        (
            _option("--rows", type=POSITIVE, metavar="N", help="Number of packed rows to show (default: 3)."),
            _option("--seed", type=int, metavar="N", help="Seed of the choice of rows (default: 0)."),
            _option(
                "--split", type=click.Choice(("train", "eval")), help="Training or held-out rows (default: train)."
            ),
        ),
        ("sft preview --rows 1", "sft preview --split eval | less -R"),
    ),
    "estimate": Entry(
        "estimate time and memory of the training from a few steps",
        "stages.tools.estimate",
        (
            _option(
                "--offline",
                is_flag=True,
                default=None,
                help="Compute it from the shape of the base model alone: no weights, no data, no GPU.",
            ),
            _option("--gpu", metavar="NAME", help="With --offline: l4, rtx4090, a100, h100 (default) or h200."),
            JSON,
        ),
        (
            "sft estimate",
            "sft estimate --set train.per_device_train_batch_size=4",
            "sft estimate --offline --gpu a100",
        ),
    ),
    "summary": Entry(
        "show the figures of the last run and where its files are",
        "stages.tools.summary",
        (JSON,),
        ("sft summary", "sft summary --json | jq .models.tuned"),
    ),
    "chat": Entry(
        "talk to a model in the terminal",
        "stages.tools.chat",
        (
            MODEL,
            _option("--max-new-tokens", type=POSITIVE, metavar="N", help="Longest answer (default: 256 tokens)."),
            _option("--system", metavar="TEXT", help="System message (default: that of the training rows)."),
        ),
        ("sft chat --model quantized", "sft chat < questions.txt"),
    ),
    "serve": Entry(
        "serve a model over HTTP with OpenAI's API",
        "stages.tools.serve",
        (
            _option(
                "--model",
                type=click.Choice((*MODELS, *(model for model in SERVED_MODELS if model not in MODELS))),
                help="Model to serve (default: merged, or gguf of llama_cpp).",
            ),
            _option("--port", type=POSITIVE, metavar="N", help="Port on this machine (default: 8000)."),
            _option(
                "--engine",
                type=click.Choice(ENGINES),
                help="Program that serves it (default: transformers). `make engines` installs the others.",
            ),
            _option(
                "--plain",
                is_flag=True,
                default=None,
                help="Leave tool calls and reasoning in the text of an answer, instead of making them fields.",
            ),
        ),
        ("sft serve --model merged --port 8000", "sft serve --engine vllm --model quantized"),
        "Requests need the API key that is printed, or that of SFT_SERVE_API_KEY. Tool calls and reasoning become "
        "fields of the answer if the chat template prints them in a known form (docs/engines.md).",
    ),
    "compare": Entry(
        "show how two results differ",
        "stages.tools.compare",
        (
            _runs(2),
            _option(
                "--html",
                is_flag=False,
                flag_value="",
                metavar="[FILE]",
                help="Also write a page with curves, paired tests and answers (default: reports/comparison.html).",
            ),
            JSON,
        ),
        ("sft compare champion candidate", "sft compare champion . --html", "sft compare A B --json | jq .verdict"),
        "A run is named by its id, name or alias; `.` is the result in this checkout.",
    ),
    "reproduce": Entry(
        "repeat a recorded run and compare the results",
        "stages.tools.reproduce",
        (
            _runs(1),
            _option("--keep", is_flag=True, default=None, help="Keep the worktree that the run was repeated in."),
            _option(
                "--trust-patch",
                is_flag=False,
                flag_value="",
                metavar="[DIGEST]",
                help="Run the uncommitted changes that were recorded; DIGEST, which is shown with them, names those "
                "that you have read.",
            ),
            _option("--data", metavar="FOLDER", help="Data of the run of a shipped folder (default: that here)."),
        ),
        (
            "sft reproduce champion",
            "sft reproduce champion --trust-patch 0a1b2c3d",
            "sft reproduce outs/publish/model --data data",
        ),
        "A run is named by its id, name or alias, or by the path of a shipped folder, for which neither a checkout nor "
        "MLflow is needed.",
        folder="runs",
    ),
    "verify": Entry(
        "check that the files in outs/, or of a shipped folder, are those that were recorded",
        "stages.tools.verify",
        (
            click.Argument(["folder"], required=False, metavar="[FOLDER]"),
            _option("--key", metavar="FILE", help="Public key (PEM) that FOLDER must be signed with."),
            _option(
                "--engine", type=click.Choice(ENGINES), help="Ask this engine the held-out prompts (`make engines`)."
            ),
            _option(
                "--model",
                type=click.Choice(SERVED_MODELS),
                help="Model that the engine serves (default: the shipped one).",
            ),
            JSON,
        ),
        (
            "sft verify",
            "sft verify outs/publish/model",
            "sft verify FOLDER --key signer.pub --json",
            "sft verify --engine vllm",
        ),
        "Without FOLDER, compares outs/ with dvc.lock. FOLDER is one that `sft publish` wrote; neither a checkout nor "
        "MLflow is needed, and it also says what the model was trained on, and whether that can be repeated. "
        "With --engine, starts the engine on this machine, asks it the held-out prompts over HTTP, and compares its "
        "answers with those that `sft evaluate` recorded.",
        folder="folder",
    ),
    "schema": Entry(
        "print the JSON Schema of params.yaml, for editors",
        "stages.tools.schema",
        (),
        ("sft schema > params.schema.json", "sft schema --set train.lora_r=8 > params.schema.json"),
        "Editors with a YAML language server complete params.yaml by this file, which its first line names. "
        "They propose the values of --set.",
        reads_params=False,
    ),
}

PROJECT: dict[str, Entry] = {
    "init": Entry(
        "write the files of a project of your own",
        "stages.project.init",
        (
            click.Argument(
                ["folder"],
                type=click.Path(path_type=Path, file_okay=False),
                default=Path(),
                metavar="[FOLDER]",
            ),
            _option(
                "--recipe", metavar="NAME", shell_complete=_complete_recipe, help="Start from the values of a recipe."
            ),
            _option("--keep", is_flag=True, default=None, help="Leave files that exist already as they are."),
            _option("--git/--no-git", default=None, help="Make a git repository if FOLDER is in none (default: do)."),
        ),
        ("sft init my-project", "sft init . --keep --set model.name_or_path=Qwen/Qwen3-0.6B"),
        "Writes params.yaml, dvc.yaml, prefect.yaml, data/, tasks/, .gitignore and .dvc/ into FOLDER (by default this "
        "folder), whose results the installed package then computes. Nothing is overwritten.",
        reads_params=False,
    ),
    "upgrade": Entry(
        "bring the files of a project to the installed version",
        "stages.project.upgrade",
        (_option("--replace", multiple=True, metavar="FILE", help="Renew a file that was changed, too; repeatable."),),
        ("sft upgrade", "sft upgrade --replace dvc.yaml"),
        "After `pip install --upgrade sft-pipeline`: adds the keys that params.yaml lacks, with their comments, and "
        "renews dvc.yaml, prefect.yaml and the other files that `sft init` wrote, except those that you changed.",
        reads_params=False,
    ),
    "code": Entry(
        "write digests of the code that each stage uses",
        "stages.project.digests",
        (),
        ("sft code",),
        "A project's dvc.yaml runs this command, so that DVC notices a new version of the package. "
        "`dvc repro` runs it each time.",
        reads_params=False,
        takes_values=False,
    ),
}

TOOLS["import"] = Entry(
    "make params.yaml of a configuration for Axolotl, LLaMA-Factory, trl or unsloth",
    "stages.importing.command",
    (
        click.Argument(["peer"], type=click.Choice(("axolotl", "llamafactory", "trl", "unsloth"))),
        click.Argument(["source"], nargs=-1, required=True, metavar="FILE"),
        _option("--dataset-info", metavar="FILE", help="LLaMA-Factory's dataset_info.json (default: in dataset_dir)."),
        _option("--processes", type=POSITIVE, metavar="N", help="Number of GPUs that train together (default: 1)."),
        _option("--force", is_flag=True, default=None, help="Replace an existing params.yaml."),
        JSON,
    ),
    (
        "sft import axolotl config.yml",
        "sft import llamafactory train.yaml --dataset-info data/dataset_info.json",
        "sft import trl 'accelerate launch sft.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name org/chats'",
        "sft import unsloth notebook.ipynb --json",
    ),
    "Prints what became of each key of the source: the same effect, the nearest value with the difference, not "
    "supported with the reason, or irrelevant. Keys that the file does not state get the other project's default.",
    reads_params=False,
)

TOOLS["recipes"] = Entry(
    "list the recipes for named models, or show one as a params.yaml",
    "stages.recipes.listing",
    (click.Argument(["recipe"], required=False, metavar="[NAME]"), JSON),
    ("sft recipes", "sft recipes qwen3.5-4b-tools --set train.lora_r=8 > params.yaml"),
    reads_params=False,
)

FLOWS = {
    "pipeline": "run the pipeline as a Prefect flow in this terminal",
    "ui": "serve the pages of Prefect and MLflow on this machine",
    "sweep": "run the pipeline with several values of params",
    "nightly": "run the pipeline if the data changed, and report",
    "cleanup": "list and delete what nothing needs any more",
}


def command_line(
    run: Callable[..., int], run_flow: Callable[[str, tuple[str, ...]], int], *, show_alone: bool = True
) -> Group:
    """Return the group of all commands.

    Args:
        run: Called with the name of a stage or tool, and the values of its options.
        run_flow: Called with the name of a flow and its arguments.
        show_alone: Whether stages run by DVC and have the options for it; else they run alone.
    """
    stages = STAGES if show_alone else {name: _without_dvc(entry) for name, entry in STAGES.items()}
    return Group(
        sections={
            "Tools": tuple(make_command(name, entry, _common(entry), run) for name, entry in TOOLS.items()),
            "Stages, in order": tuple(make_command(name, entry, (SET, ROOT), run) for name, entry in stages.items()),
            "Project": (
                make_command("init", PROJECT["init"], (SET,), run),
                make_command("upgrade", PROJECT["upgrade"], _common(PROJECT["upgrade"]), run),
                make_command("code", PROJECT["code"], _common(PROJECT["code"]), run),
            ),
            "Flows": tuple(_flow_command(name, text, run_flow) for name, text in FLOWS.items()),
            "Shell": (_completion_command(),),
        },
        help="Fine-tune a language model: check, run and inspect the pipeline of this folder.\n\n"
        "`sft COMMAND --help` shows the options and examples of a command.",
        epilog=EXIT_CODES,
        no_args_is_help=True,
        context_settings={"max_content_width": 110},
    )


def _common(entry: Entry) -> tuple[click.Parameter, ...]:
    """Return the options that a command has besides its own."""
    return (SET, ROOT) if entry.takes_values else (ROOT,)


def _without_dvc(entry: Entry) -> Entry:
    name = entry.home.rpartition(".")[2]
    return Entry(
        entry.summary,
        entry.home,
        (),
        (f"python -m stages {name}",),
        f"Runs this stage alone on what is in outs/. `sft {name}` also brings what it reads up to date.",
        entry.writes_params,
    )


def _flow_command(name: str, summary: str, run_flow: Callable[[str, tuple[str, ...]], int]) -> click.Command:
    """Return the command that passes its arguments to a flow, which has its own help."""
    return click.Command(
        name,
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        callback=lambda arguments: run_flow(name, arguments),
        short_help=summary,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    )


def _completion_command() -> click.Command:
    return click.Command(
        "completion",
        params=[click.Argument(["shell"], type=click.Choice(SHELLS))],
        callback=print_completion,
        short_help="print the completion script of a shell",
        help="Print the completion script of a shell.\n\n"
        "\b\nbash  echo 'eval \"$(sft completion bash)\"' >> ~/.bashrc\n"
        "zsh   echo 'eval \"$(sft completion zsh)\"' >> ~/.zshrc\n"
        "fish  sft completion fish > ~/.config/fish/completions/sft.fish",
    )


@click.pass_context
def print_completion(context: click.Context, shell: str) -> int:
    """Print the completion script of a shell."""
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(context.find_root().command, {}, "sft", COMPLETE).source())
    return 0
