"""python -m robust.evaluate: attack a model, say how its accuracy falls, leave CSV and HTML."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from robust import cli
from robust.errors import InputError
from robust.options import Options, default_attacks, parse_eps, parse_names, parse_number

_MODEL, _DATA, _ATTACK, _RUN = cli.MODEL, cli.DATA, "Attack", "Run"


def evaluate(
    model: cli.ModelSpec = "efficientnet_lite0",
    weights: cli.Weights = None,
    input_size: cli.InputSize = None,
    conv: Annotated[
        str,
        typer.Option(
            help="What computes the network: torch, or [bold]scratch[/], the project's own convolution, batch-norm, "
            "pooling and linear layers.",
            rich_help_panel=_MODEL,
        ),
    ] = "torch",
    data: cli.DataSpec = "samples",
    label: cli.Label = None,
    data_root: cli.DataRoot = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Use a class-balanced subset of N images, drawn from the seed.", rich_help_panel=_DATA),
    ] = None,
    skip_bad_images: cli.SkipBadImages = False,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help="Any of --list-attacks, such as autoattack; repeat it, or separate by commas. Default: fgsm, pgd "
            "and the control noise (in l1 and l0, others that suit).",
            rich_help_panel=_ATTACK,
        ),
    ] = None,
    norm: Annotated[
        str, typer.Option(help="linf, l2, l1, or l0, which counts values.", rich_help_panel=_ATTACK)
    ] = "linf",
    eps: Annotated[
        str | None,
        typer.Option(
            help="Radius in pixels of \\[0, 1], such as 8/255; several by commas are one run. "
            "Default: a few that suit the images.",
            rich_help_panel=_ATTACK,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of those attacks that take them. Default: the attack's own, 40 for pgd.",
                                 rich_help_panel=_ATTACK)
    ] = None,
    step_size: Annotated[
        str | None,
        typer.Option(
            help="Step of pgd as a fraction of eps (default: 4 / steps), and the first of fmn and sigma-zero.",
            rich_help_panel=_ATTACK,
        ),
    ] = None,
    restarts: Annotated[
        int, typer.Option(help="Random starts tried on an image that still stands.", rich_help_panel=_ATTACK)
    ] = 1,
    random_start: Annotated[
        bool | None,
        typer.Option(
            help="Begin at a random point of the ball, or at the image. Default: the attack's own, random for pgd.",
            rich_help_panel=_ATTACK,
        ),
    ] = None,
    queries: Annotated[
        int | None,
        typer.Option(help="Points that square may try. Default: 5000.", rich_help_panel=_ATTACK),
    ] = None,
    eot: Annotated[
        int | None,
        typer.Option(
            help="For a randomised model: evaluate every point N times, take their vote and mean gradient.",
            rich_help_panel=_ATTACK,
        ),
    ] = None,
    surrogate: Annotated[
        str | None,
        typer.Option(help="The network, named like --model, that attack transfer crafts on.", rich_help_panel=_ATTACK),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Reach this class (name or index), rather than any wrong one.", rich_help_panel=_ATTACK),
    ] = None,
    certify: Annotated[
        bool | None,
        typer.Option(
            help="In linf: prove what bounds can; attacks are spared where nothing is to be found. Default: where an "
            "attack is so long that it pays.",
            rich_help_panel=_ATTACK,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images evaluated at once.", rich_help_panel=_RUN)] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...", rich_help_panel=_RUN)] = "auto",
    seed: Annotated[int, typer.Option(help="Of every random number.", rich_help_panel=_RUN)] = 0,
    output: Annotated[
        Path | None,
        typer.Option(help="The run directory. Default: runs/MODEL-DATE-TIME.", rich_help_panel=_RUN),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the interrupted run in --output.", rich_help_panel=_RUN)
    ] = False,
    save_adversarials: Annotated[
        bool,
        typer.Option("--save-adversarials", help="Keep every adversarial, in adversarials.npz.", rich_help_panel=_RUN),
    ] = False,
    list_models: Annotated[
        bool, typer.Option("--list-models", help="Print the names that --model knows, and stop.", rich_help_panel=_RUN)
    ] = False,
    list_attacks: Annotated[
        bool, typer.Option("--list-attacks", help="Print the names that --attack knows, and stop.",
                           rich_help_panel=_RUN)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.", rich_help_panel=_RUN)] = False,
) -> int:  # fmt: skip
    """Attack an image classifier and report its accuracy under perturbation.

    Without options it evaluates the bundled network on the bundled images, offline, in a minute or two.
    Pixels are in \\[0, 1]; eps is in that unit. Exit codes: 0 done, 1 an attack failed, 2 wrong input, 3 a fault
    of robust itself, 130 interrupted, 141 its output went unread.
    """
    if list_models or list_attacks:
        _print_names(list_models)
        return 0
    options = Options(
        attacks=parse_names(attack) if attack else default_attacks(norm),
        norm=norm,
        eps=() if eps is None else parse_eps(eps),
        steps=steps,
        step_size=None if step_size is None else parse_number(step_size, "step_size"),
        restarts=restarts,
        random_start=random_start,
        queries=queries,
        eot=eot,
        surrogate=surrogate,
        target=target,
        batch_size=batch_size,
        limit=limit,
        seed=seed,
        device=device,
        conv=conv,
        save_adversarials=save_adversarials,
        certify=certify,
    )
    if resume and output is None:
        raise InputError("--resume needs the --output of the run to continue")
    # Late, so that --help does not wait for pandas and torch.
    from robust.store import FILENAME, holds_run, require_no_run

    output = output or Path("runs") / f"{cli.slug(model)}-{datetime.now():%Y%m%d-%H%M%S}"
    if not resume:
        require_no_run(output / FILENAME)
    elif not quiet and not holds_run(output / FILENAME):
        print(f"There is no run in {output} to resume: a new one begins.")

    command = shlex.join(["python", "-m", "robust.evaluate", *cli.without_output(sys.argv[1:])])
    with _resumable(output, command):
        from reports import write_reports
        from reports.terminal import plain_lines, summary_table
        from robust.api import execute
        from robust.data import load_data
        from robust.data.names import one_line
        from robust.models import load_model
        from robust.models.surrogate import load_surrogate
        from robust.plan import check_options
        from robust.progress import Meter

        check_options(options)
        loaded = load_model(model, weights, input_size)
        dataset = load_data(
            data, loaded, limit=limit, seed=seed, label=label, data_root=data_root, skip_bad_images=skip_bad_images
        )
        crafted_on = None if surrogate is None else load_surrogate(surrogate, input_size)
        console = Console()
        total = None if dataset.size is None else dataset.size * len(options.attacks)
        with Meter(console, total, quiet) as meter:
            run = execute(loaded, dataset, options, output, resume, one_line(command), meter, crafted_on)
        write_reports(run.store, output)
    if not quiet:
        if console.is_terminal:
            console.print(summary_table(run.store))
        else:
            print(*plain_lines(run.store), sep="\n")
        if skipped := run.store.details["skipped_images"]:
            print(f"Unreadable images left out: {len(skipped)}, the first {one_line(skipped[0])}")
        print(run.answer)
        print(f"Report: {output / 'report.html'}")
    failed = run.store.details.get("failed_attacks", {})
    for message in failed.values():
        cli.tell(f"error: {message}")
    return 1 if failed else 0


@contextmanager
def _resumable(output: Path, command: str) -> Iterator[None]:
    """Notes on what ends the block how to go on, where there is a run to go on with; of wrong input the API says it."""
    from robust.store import FILENAME, holds_run

    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            cli.ignore_interrupts()
        if not isinstance(error, InputError) and holds_run(output / FILENAME):
            error.add_note(f"what is done is kept. To go on: {command} --output {shlex.quote(str(output))} --resume")
        raise


def _print_names(models: bool) -> None:
    if models:
        from robust.models import list_models

        for source, names in list_models().items():
            print(f"{source}:", *names, sep="\n  ")
    else:
        _print_attacks()


def _print_attacks() -> None:
    """The attacks with their norms, kind, cost, options and source; of foolbox's all but cost and source."""
    import attacks

    options = {name: " ".join(attacks.takes(name)).replace("_", "-") or "-" for name in attacks.names()}
    rows = [("name", "norms", "kind", "cost a step", "options", "source")]
    rows += [
        (name, " ".join(kind.norms), kind.kind(), kind.cost(), options[name], kind.source)
        for name, kind in attacks.ATTACKS.items()
    ]
    for name, standard in attacks.ENSEMBLES.items():
        ensemble = standard("linf", 10)
        parts = " + ".join(stage.name for stage in ensemble.stages)
        norms = " ".join(attacks.autoattack.NORMS)
        rows.append((name, norms, "ensemble", parts, options[name], ensemble.source))
    _print_table(rows)
    foreign = [name for name in attacks.names() if name.startswith(attacks.PREFIX)]
    kinds = {name: attacks.foolbox.norms_and_kind(name) for name in foreign}
    _print_table([(name, " ".join(norms) or "-", kind, options[name]) for name, (norms, kind) in kinds.items()])


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(*(cell.ljust(width) for cell, width in zip(row, [*widths[:-1], 0], strict=True)), sep="  ")


if __name__ == "__main__":
    cli.main(evaluate)
