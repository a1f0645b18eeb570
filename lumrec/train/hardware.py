"""GPUs that a training can be planned for, and TorchRec's topology of machines that have them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.constants import DDR_MEM_BW

from lumrec.train.flops import gemm_peak
from lumrec.train.plan import quiet_torchrec


class Hardware(NamedTuple):
    """A GPU as its maker describes it, in decimal GB and TFLOP, or a process on a CPU (memory 0: the machine's).

    bandwidth: of that memory, GB/s. bf16, fp32: TFLOP/s of matrix products, without sparsity; torch multiplies float32
    without TF32. link, host: GB/s to the other GPUs of the machine, and to the machine's memory, one way.
    """

    memory: float
    bandwidth: float
    bf16: float
    fp32: float
    link: float
    host: float


# NVIDIA's data sheets: A100 (SXM4), H100 and H200 (SXM5), DGX B200 (an eighth of it), L40S (PCIe 4, without NVLink).
GPUS = {
    "a100-40g": Hardware(40, 1555, 312, 19.5, 300, 32),
    "a100-80g": Hardware(80, 2039, 312, 19.5, 300, 32),
    "h100": Hardware(80, 3350, 989, 67, 450, 64),
    "h200": Hardware(141, 4800, 989, 67, 450, 64),
    "b200": Hardware(180, 8000, 2250, 75, 900, 64),
    "l40s": Hardware(48, 864, 362, 91.6, 32, 32),
}


@functools.cache
def this_cpu() -> Hardware:
    """One process on this machine's CPU: the peaks are measured, the bandwidths are TorchRec's."""
    device, threads, bandwidth = torch.device("cpu"), torch.get_num_threads(), DDR_MEM_BW / 1e6
    bf16, fp32 = (gemm_peak(device, dtype, num_threads=threads) / 1e12 for dtype in (torch.bfloat16, torch.float32))
    return Hardware(0, bandwidth, bf16, fp32, bandwidth, bandwidth)


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines of `gpus` ranks each. network: GB/s between machines, of each rank, one way. host_memory: bytes
    of each machine."""

    hardware: Hardware
    nodes: int
    gpus: int
    network: float
    host_memory: float

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    @property
    def memory(self) -> float:
        """Bytes that a rank can have: those of its GPU, or its share of the machine's memory."""
        return 1e9 * self.hardware.memory or self.host_memory / self.gpus

    def topology(self, table_memory: float) -> Topology:
        """What TorchRec's planner reads, in bytes and milliseconds. table_memory: bytes of a rank for its tables."""
        memory = int(max(0, table_memory))
        with quiet_torchrec():
            return Topology(
                world_size=self.ranks,
                local_world_size=self.gpus,
                compute_device="cuda" if self.hardware.memory else "cpu",
                hbm_cap=memory,
                ddr_cap=memory,  # of a CPU; on GPUs nothing lies there
                hbm_mem_bw=1e6 * self.hardware.bandwidth,
                hbm_to_ddr_mem_bw=1e6 * self.hardware.host,
                intra_host_bw=1e6 * self.hardware.link,
                inter_host_bw=1e6 * self.network,
            )

    def gather_s(self, num_bytes: float) -> float:
        """Seconds in which every rank gets all of `num_bytes` that are spread over the ranks (a ring, as in NCCL).

        A reduce-scatter takes as long, an all-reduce twice. Rings leave a machine through the cards of all its ranks.
        """
        within = num_bytes * (self.gpus - 1) / self.gpus / self.hardware.link
        between = num_bytes * (self.nodes - 1) / self.nodes / (self.gpus * self.network)
        return max(within, between) / 1e9
