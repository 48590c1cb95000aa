"""More mistakes for `test_bad_input.py`: settings of training, caches, streams and shards, paths that cannot be."""

import io
import tarfile

from PIL import Image

TRAIN = "train --data npz:{good}/data.npz --model mlp:4"
DISTILL = "distill --data npz:{good}/data.npz --teacher {good}/run --student mlp:3 --smoke --per-class 0"
TOO_LONG = "x" * 300


def _png(grey):
    file = io.BytesIO()
    Image.new("L", (4, 4), grey).save(file, "png")
    return file.getvalue()


def shards(folder):
    """Tar files that are none, each in a folder of its own."""
    whole = {f"{n}.{end}": content for n in range(4) for end, content in (("png", _png(n)), ("cls", b"%d" % (n % 2)))}
    made = {
        "leaves": {"../a.png": _png(0), "../a.cls": b"0"},
        "packed": whole,
        "no_class": {"a.png": _png(0)},
        "words": {"a.png": _png(0), "a.cls": b"cat"},
        "no_image": {"a.cls": b"1"},
        "torn": whole,
    }
    for name, members in made.items():
        (folder / "shards" / name).mkdir(parents=True)
        file = folder / "shards" / name / "train.tar"
        with tarfile.open(file, "w:gz" if name == "packed" else "w") as archive:
            for path, content in members.items():
                member = tarfile.TarInfo(path)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        if name == "torn":
            file.write_bytes(file.read_bytes()[:3000])
    (folder / "shards" / "empty").mkdir()


CASES = {
    "average of more than all": (TRAIN + " --ema 1.5", r"`ema` of `Training` .* in \(0, 1\)\. Got 1\.5\. Use None"),
    "gradients clipped to less than nothing": (TRAIN + " --clip -1", r"`clip` of `Training` .* positive\. Got -1\.0\."),
    "no batches in a step": (TRAIN + " --accumulate 0", r"`accumulate` of `Training` must be .* at least 1\. Got 0\."),
    "never validated": (TRAIN + " --validate-every 0", r"`validate_every` of `Training` must be .* Got 0\."),
    "never kept": (TRAIN + " --checkpoint-every 0", r"`checkpoint_every` of `Training` must be .* Got 0\."),
    "stopped before it begins": (
        TRAIN + " --max-steps 0",
        r"`max_steps` of `Training` must be .* at least 1\. Got 0\.",
    ),
    "weights that grow": (TRAIN + " --weight-decay -1", r"`weight_decay` of `Training` must be .* Got -1\.0\."),
    "momentum above 1": (TRAIN + " --momentum 2", r"`momentum` of `Training` must be .* in \[0, 1\)\. Got 2\.0\."),
    "fewer than no views": (TRAIN + " --views -1", r"`views` of `Training` must be .* at least 0\. Got -1\."),
    "fewer than no workers": (TRAIN + " --workers -1", r"`workers` of `Training` must be .* at least 0\. Got -1\."),
    "less than no memory": (TRAIN + " --resident-mib -1", r"`resident_mib` of `Training` must be .* Got -1\."),
    "graphs of nothing": (TRAIN + " --cuda-graphs", r"`cuda_graphs` .* must be used with `compile`\. Set compile=True"),
    "rate without end": (TRAIN + " --lr 1e400", r"`lr` of `Training` must be finite and positive\. Got inf\."),
    "layers of no width": (TRAIN + " --model mlp:0", r"`hidden` of `mlp` must be widths of at least 1\. Got \(0,\)\."),
    "width of 67 bits": (TRAIN + " --model mlp:99999999999999999999", r"must run on inputs .* Got \w+Error"),
    "layout of letters": (TRAIN + " --model vgg:64-Q", r"`layout` of `vgg` must be .* Got '64-Q'\."),
    "no card of that number": (TRAIN + " --device cuda:-1", r"`device` must be 'cpu'.* Got 'cuda:-1'\."),
    "no step with derivatives": (DISTILL + " --every 0", r"`--every` of `distill` must be at least 1\. Got 0\."),
    "no sample with derivatives": (
        DISTILL + " --fraction 0",
        r"`fraction` of `Distillation` must be above 0 .* Got 0\.0\.",
    ),
    "more than all samples": (DISTILL + " --fraction 1.5", r"`fraction` of .* at most 1\. Got 1\.5\."),
    "unknown engine": (DISTILL + " --engine fastest", r"`--engine` must be one of auto, forward, .* Got 'fastest'\."),
    "no rows at once": (DISTILL + " --probe-chunk 0", r"`chunk_size` of .* at least 1, or None\. Got 0\."),
    "no directions": (DISTILL + " --probes 0", r"`--probes` of `distill` must be at least 1\. Got 0\."),
    "a weight without end": (DISTILL + " --outputs-weight inf", r"`--outputs-weight` of `distill` .* Got inf\."),
    "a weight that is no number": (DISTILL + " --jacobian-weight nan", r"`--jacobian-weight` of `distill` .* Got nan"),
    "unknown policy": (
        DISTILL + " --batch-norm frosen",
        r"`--batch-norm` must be one of batch, frozen.* Nearest: frozen",
    ),
    "statistics of nothing": (DISTILL + " --teacher-mean 0.5", r"`--teacher-mean` and .* need --teacher-weights"),
    # caches
    "no cache": ("cache info", r"`--cache` of `cache` must be given\. Write jacmatch cache info --cache DIR"),
    "an action that is none": ("cache bild", r"ACTION must be one of build, check, info\. Got 'bild'\. Nearest: build"),
    "info of nothing": ("cache info --cache none", r"none \(`--cache`\) must be a teacher's cache\. Got no folder"),
    "check of no cache": ("cache check --cache {bad}", r"must be a teacher's cache\. Got a folder without seed0/cache"),
    "two folders of a cache": ("cache build --cache c --out d", r"`--out` of `cache` must be left out.* Got d\."),
    "unknown number type": (
        "cache build --cache c --store float8",
        r"`--store` must be one of float32, .* Got 'float8'",
    ),
    "shards of nothing": (
        "cache build --cache c --shard-megabytes nan",
        r"`--shard-megabytes` .* above 0\. Got nan\.",
    ),
    "a file for a cache": ("cache build --cache {good}/data.npz", r"must be writable.* 'File exists'"),
    "data of no cache": ("cache build --cache c --data npz:none.npz", r"must name an existing file\. Got 'none\.npz'"),
    "a cache that is not there": (DISTILL + " --cache none", r"none/seed0 must be a teacher's cache for one seed\."),
    # streams and shards
    "no stream": ("train --data stream:none", r"`--data stream:DIR` must name an existing folder\. Got 'none'"),
    "a stream of no classes": ("train --data stream:{bad}/no_classes", r"must have one folder for each class"),
    "a stream of unequal pictures": (
        "train --data stream:{bad}/unequal",
        r"must be 4 × 4 like the first\. Got 5 × 5 in",
    ),
    "no picture in a stream": (
        "train --data stream:{bad}/one_broken",
        r"1\.png must be an image\. Got UnidentifiedImageError: cannot identify image file\. ",
    ),
    "a stream of no size": ("train --data stream:{bad}/unequal@0", r"SIZE of `--data stream:DIR@SIZE` .* Got '0'\."),
    "no shards": (
        "train --data wds:{bad}/shards/empty",
        r"must have training shards\. Got an empty folder\. Lay it out",
    ),
    "a shard that leaves": (
        "train --data wds:{bad}/shards/leaves",
        r"names inside the archive only\. Got a path that leads out",
    ),
    "a packed shard": ("train --data wds:{bad}/shards/packed", r"must be an uncompressed tar file\. Got ReadError"),
    "a shard without classes": (
        "train --data wds:{bad}/shards/no_class",
        r"must have a class in each sample.* at 'a'\.",
    ),
    "a shard without images": ("train --data wds:{bad}/shards/no_image", r"must have an image .* Got none, at 'a'\."),
    "a class in words": (
        "train --data wds:{bad}/shards/words",
        r"'a\.cls' must be a class index.* Got 'cat'\. Number",
    ),
    "half a shard": ("train --data wds:{bad}/shards/torn", r"must be an uncompressed tar file\. Got ReadError"),
    "a number of no name": ("train --data synthetic:Q=1", r"must be a known name\. Got 'Q'\. Known: D, K, N, T\."),
    "no dimension": ("train --data synthetic:D=0", r"D of `--data synthetic` must be .* at least 1\. Got '0'\."),
    "more than the memory": (
        "train --data synthetic:D=1000000000",
        r"must fit into memory\. Got 53,\d{3}\.\d GiB on a",
    ),
    # paths and words
    "no name of a folder": (f"{TRAIN} --out {TOO_LONG}", r"must be writable\. Got 'File name too long'\. Choose"),
    "no name of a run": (f"evaluate {TOO_LONG}/run", r"must be a run folder\. Got no folder of that name\."),
    "no name of a teacher": (f"{DISTILL} --teacher {TOO_LONG}", r"must be a known name\. Got 'xxx"),
    "no name of a cache": (f"{DISTILL} --cache {TOO_LONG}", r"must be a teacher's cache for one seed\. Got no folder"),
    "no name of settings": (f"train --config {TOO_LONG}", r"must name a JSON or YAML file.*Got File name too long"),
    "no name of a file": (f"train --data npz:{TOO_LONG}", r"must name an existing file\. Got 'xxx.* does not exist"),
    "settings without end": ("train --config /dev/zero", r"Got a file of more than 1,048,576 bytes\."),
    "settings of numbers": ("train --config {good}/data.npz", r"Got a file that cannot be parsed \('utf-8' codec"),
    "an empty word": ("train --steps=", r"`--steps` must be an integer\. Got ''\."),
    "a word too many": ("train --steps 3 4", r"unexpected word\. Got '4'\. See jacmatch train --help\."),
    "nothing to evaluate": ("evaluate", r"MODEL must be given\. Write jacmatch evaluate MODEL\."),
    "a list of nothing": ("list all", r"unexpected word\. Got 'all'\. See jacmatch list --help\."),
}
