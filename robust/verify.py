"""python -m robust.verify: is a network on the project's own convolution the same network? The ladder, gate by gate."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from robust import cli
from robust.errors import InputError
from robust.files import check_writable
from robust.options import parse_number

_DATA, _GATES, _RUN = cli.DATA, "What is measured", "Run"


def verify(
    model: Annotated[  # not cli.ModelSpec, which names models too that are on the project's layers as they are
        str,
        typer.Option(
            help="torchvision name, [bold]torchvision:NAME@WEIGHTS[/], [bold]timm:NAME[/], the bundled "
            "efficientnet_lite0, or [bold]file.py:factory[/] (module:factory).",
            rich_help_panel=cli.MODEL,
        ),
    ] = "efficientnet_lite0",
    weights: cli.Weights = None,
    input_size: cli.InputSize = None,
    data: cli.DataSpec = "samples",
    label: cli.Label = None,
    data_root: cli.DataRoot = None,
    limit: Annotated[
        int, typer.Option(help="Use a class-balanced subset of N images, drawn from the seed.", rich_help_panel=_DATA)
    ] = 20,
    skip_bad_images: cli.SkipBadImages = False,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, tf32, bfloat16 or float16: of the convolutions, logits and input gradient. Attacks run in "
            "float32.",
            rich_help_panel=_GATES,
        ),
    ] = "float32",
    algorithm: Annotated[
        str,
        typer.Option(
            help="im2col, winograd2, winograd4 or triton, where it suits; auto elsewhere, and by default everywhere.",
            rich_help_panel=_GATES,
        ),
    ] = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images in a full-size convolution. Default: 2 on a CPU, 32 on a GPU.",
                     rich_help_panel=_GATES),
    ] = None,
    eps: Annotated[
        str | None,
        typer.Option(
            help="Of the attacks, in linf and pixels of \\[0, 1]. Default: 4/255, small images 8/255, digits 0.3.",
            rich_help_panel=_GATES,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Of PGD.", rich_help_panel=_GATES)] = 10,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...", rich_help_panel=_RUN)] = "auto",
    seed: Annotated[int, typer.Option(help="Of every random number.", rich_help_panel=_RUN)] = 0,
    output: Annotated[
        Path | None,
        typer.Option(help="Where the reports go. Default: runs/verify-MODEL-DATE-TIME.", rich_help_panel=_RUN),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.", rich_help_panel=_RUN)] = False,
) -> int:  # fmt: skip
    """Verify the project's own convolution against torch's, on a network.

    Every algorithm in miniature, from plain loops up; every distinct convolution
    of the network at full size, forward and both gradients, against torch in
    float64; the whole network's logits and input gradient; FGSM and PGD on the
    original and on the network without torch's convolution.
    Exit codes: 0 all gates hold, 1 one does not, 2 wrong input, 3 a fault of
    robust itself, 130 interrupted, 141 its output went unread.
    """
    radius = None if eps is None else parse_number(eps, "eps")
    output = output or Path("runs") / f"verify-{cli.slug(model)}-{datetime.now():%Y%m%d-%H%M%S}"
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; name a folder with --output")
    if (output / "verify.json").exists():
        raise InputError(f"{output} holds a verification already; name another --output")
    try:
        check_writable(output / "verify.json")
    except OSError as error:
        raise InputError(f"nothing can be written to {output} ({error.strerror}); name another --output") from None

    # Late, so that --help does not wait for torch.
    from reports.verify import write_verification
    from reports.verifyterminal import plain_lines, print_tables
    from robust import verification
    from robust.data import load_data
    from robust.models import load_model

    loaded = load_model(model, weights, input_size)
    dataset = load_data(
        data, loaded, limit=limit, seed=seed, label=label, data_root=data_root, skip_bad_images=skip_bad_images
    )
    console = Console()
    try:
        with _progress(console, quiet) as listener:
            verified = verification.verify(
                loaded, dataset, device=device, precision=dtype, algorithm=algorithm, batch_size=batch_size,
                eps=radius, steps=steps, seed=seed, listener=listener,
            )  # fmt: skip
    except KeyboardInterrupt as error:
        error.add_note("nothing was written")
        raise
    write_verification(
        verified, output, shlex.join(["python", "-m", "robust.verify", *cli.without_output(sys.argv[1:])])
    )
    if not quiet:
        if console.is_terminal:
            print_tables(console, verified)
        else:
            print(*plain_lines(verified), sep="\n")
        print(f"Report: {output / 'verify.html'}")
        print(verified.answer)
    elif not verified.passed:
        cli.tell(verified.answer)
    return 0 if verified.passed else 1


@contextmanager
def _progress(console: Console, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, which says what is being done; elsewhere nothing."""
    with Progress(
        BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
        console=console, transient=True, disable=quiet or not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("")
        yield lambda what, done, total: bar.update(task, description=escape(what), completed=done, total=total)


if __name__ == "__main__":
    cli.main(verify)
