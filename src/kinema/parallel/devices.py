"""Devices that plans are made for: their memory, their speed, how they are linked."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from kinema.errors import UserError
from kinema.suggest import did_you_mean


@dataclass(frozen=True)
class Device:
    """One kind of accelerator."""

    name: str
    memory: float
    """Bytes."""
    flops: float
    """bf16 products of matrices a second with fp32 sums, without sparsity."""
    link: float
    """Bytes a second that one device sends to others of its node while it receives as many."""
    host: float = 50e9
    """Bytes a second between it and its machine's memory, one way: PCIe 5, or 4 where that is said."""


_NVLINK4 = 450e9  # 900 GB/s in both directions together: NVIDIA H100 data sheet
_NVLINK3 = 300e9  # 600 GB/s likewise: NVIDIA A100 data sheet
_PCIE5 = 50e9  # of 64 GB/s by 16 lanes
_PCIE4 = 25e9  # of 32 GB/s

KNOWN = {
    device.name: device
    for device in (
        # NVIDIA's data sheets; where they give figures with sparsity, half of them. B200: a share of a DGX B200.
        Device("B200", 180e9, 2250e12, 900e9),
        Device("H200", 141e9, 989e12, _NVLINK4),
        Device("H100", 80e9, 989e12, _NVLINK4),
        Device("H800", 80e9, 989e12, 200e9),
        Device("H20", 96e9, 148e12, _NVLINK4),
        Device("A100", 80e9, 312e12, _NVLINK3, _PCIE4),
        Device("A100-40GB", 40e9, 312e12, _NVLINK3, _PCIE4),
        Device("L40S", 48e9, 362e12, _PCIE4, _PCIE4),
        Device("L4", 24e9, 121e12, _PCIE4, _PCIE4),
        Device("A6000", 48e9, 155e12, _PCIE4, _PCIE4),
        # GeForce: fp32 sums run at half the rate of fp16 ones (NVIDIA Ada and Blackwell architecture papers).
        Device("5090", 32e9, 210e12, _PCIE5),
        Device("4090", 24e9, 165e12, _PCIE4, _PCIE4),
        Device("3090", 24e9, 71e12, _PCIE4, _PCIE4),
        # AMD's data sheet; seven links of 64 GB/s, one to each of the others.
        Device("MI300X", 192e9, 1307e12, 448e9),
    )
}
NETWORK = 50e9
"""Bytes a second between nodes, for each device: 400 Gbit/s InfiniBand, one adapter a device."""
PER_NODE = 8
PROCESSOR = Device("processor", 0.0, 1e11, 5e9, 5e9)
"""A process on a processor; all that counts is how plans compare."""
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_BINARY = {"k": 2.0**10, "m": 2.0**20, "g": 2.0**30, "t": 2.0**40}


@dataclass(frozen=True)
class Cluster:
    """Devices of one kind, ``per_node`` to a node."""

    device: Device
    count: int
    per_node: int
    network: float = NETWORK
    """Bytes a second that a device sends to other nodes."""
    host_memory: float = math.inf
    """Bytes of its machine's own memory that there are for each device."""
    on_gpu: bool = True
    """Whether the margins of a GPU's allocator count."""

    @property
    def nodes(self) -> int:
        return -(-self.count // self.per_node)

    def bandwidth(self, span: int) -> float:
        """Of a group of devices that spans ``span`` neighbours: that of the node, or of the network beyond it."""
        return self.device.link if span <= self.per_node else self.network


def parse_devices(
    text: str, nodes: int | None = None, link: float | None = None, network: float | None = None
) -> Cluster:
    """``64xH100``, ``8x80GB``, ``H100`` or ``24GB`` as a cluster. ``link`` and ``network`` in bytes a second.

    UserError for a device that is not known, and a number that does not fill its nodes.
    """
    match = re.fullmatch(r"(?:(\d+)\s*[xX*]\s*)?(\S.*)", text.strip())
    count, what = (int(match[1] or 1), match[2].strip()) if match else (0, text)
    if count < 1:
        raise UserError(f"--devices: '{text}' is no number of devices; write 64xH100 or 8x80GB.")
    device = _device(what)
    if link is not None:
        device = replace(device, link=link)
    per_node = PER_NODE if nodes is None else count // max(1, nodes)
    if nodes is not None and (nodes < 1 or count % nodes):
        raise UserError(f"--nodes: {count} devices do not fill {nodes} nodes evenly.")
    if nodes is None and count > PER_NODE and count % PER_NODE:
        raise UserError(f"--devices: {count} do not fill nodes of {PER_NODE}. Say with --nodes how many there are.")
    return Cluster(device, count, min(per_node, count), network or NETWORK)


_AMOUNT = r"(\d+(?:\.\d+)?)\s*([kmgt])(i?)b?"


def memory_of(text: str) -> float:
    """``24GB``, ``512MiB`` in bytes."""
    match = re.fullmatch(_AMOUNT, text.strip().lower())
    assert match is not None, f"'{text}' is no amount of memory"
    return float(match[1]) * (_BINARY if match[3] else _UNITS)[match[2]]


def _device(what: str) -> Device:
    by_name = {name.lower(): device for name, device in KNOWN.items()}
    name = re.sub(r"^(?:nvidia|geforce|rtx|amd|instinct)[\s-]*", "", what.lower())
    name = re.sub(r"^(?:geforce|rtx)[\s-]*", "", name)
    if name in by_name:
        return by_name[name]
    if re.fullmatch(_AMOUNT, what.lower()) is None:
        known = ", ".join(KNOWN)
        raise UserError(
            f"--devices: no device '{what}' is known{did_you_mean(what, KNOWN)} Known: {known}; or give the "
            "memory, such as 80GB."
        )
    memory = memory_of(what)
    like = "H100" if memory >= 80e9 else "A100" if memory >= 40e9 else "4090"
    return replace(KNOWN[like], name=f"{memory / 1e9:g} GB, else as {like}", memory=memory)
