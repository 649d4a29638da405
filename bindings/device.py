"""What a GPU is, and which GPUs can read and write each other's memory."""

import dataclasses

from .errors import CudaCallError, MissingLibraryError, check, driver


@dataclasses.dataclass(frozen=True)
class DeviceInfo:
    """cc: compute capability (major, minor). smem_optin: dynamic plus static shared memory one block may have, bytes.
    l2_bytes, memory_bytes: sizes in bytes. cooperative: cooperative launches work. vmm: the memory can be shared by
    handle (what NVSHMEM maps peers with). driver_cuda: newest CUDA version of the driver, (major, minor)."""

    index: int
    name: str
    cc: tuple[int, int]
    num_sms: int
    smem_optin: int
    smem_per_sm: int
    l2_bytes: int
    memory_bytes: int
    cooperative: bool
    vmm: bool
    pci: str
    driver_cuda: tuple[int, int]


def num_devices() -> int:
    """GPUs this process sees; 0 also where there is no driver."""
    try:
        return check(driver().cuDeviceGetCount(), "cuDeviceGetCount")
    except (MissingLibraryError, CudaCallError):
        return 0


def device_info(index: int = 0) -> DeviceInfo:
    """index: as in torch.device("cuda", index). Raises MissingLibraryError without a driver and
    CudaCallError without that GPU."""
    cuda = driver()
    device = check(cuda.cuDeviceGet(index), "cuDeviceGet")
    kinds = cuda.CUdevice_attribute

    def attribute(name: str) -> int:
        kind = getattr(kinds, f"CU_DEVICE_ATTRIBUTE_{name}")
        return check(cuda.cuDeviceGetAttribute(kind, device), "cuDeviceGetAttribute")

    version = check(cuda.cuDriverGetVersion(), "cuDriverGetVersion")
    return DeviceInfo(
        index=index,
        name=check(cuda.cuDeviceGetName(128, device), "cuDeviceGetName").split(b"\0")[0].decode(),
        cc=(attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")),
        num_sms=attribute("MULTIPROCESSOR_COUNT"),
        smem_optin=attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        smem_per_sm=attribute("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR"),
        l2_bytes=attribute("L2_CACHE_SIZE"),
        memory_bytes=check(cuda.cuDeviceTotalMem(device), "cuDeviceTotalMem"),
        cooperative=bool(attribute("COOPERATIVE_LAUNCH")),
        vmm=bool(attribute("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED")),
        pci=f"{attribute('PCI_DOMAIN_ID'):04x}:{attribute('PCI_BUS_ID'):02x}:{attribute('PCI_DEVICE_ID'):02x}",
        driver_cuda=(version // 1000, version % 1000 // 10),
    )


def peer_access(i: int, j: int) -> bool:
    """Whether GPU i can load from and store to the memory of GPU j, both seen by this process. True for i == j."""
    if i == j:
        return True
    cuda = driver()
    first, second = (check(cuda.cuDeviceGet(index), "cuDeviceGet") for index in (i, j))
    return bool(check(cuda.cuDeviceCanAccessPeer(first, second), "cuDeviceCanAccessPeer"))
