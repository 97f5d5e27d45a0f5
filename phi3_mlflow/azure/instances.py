"""The instance types of managed online endpoints and their memory.

It knows nothing of models.
"""

# Names: https://learn.microsoft.com/azure/machine-learning/reference-managed-online-endpoints-vm-sku-list
# GiB of memory: https://learn.microsoft.com/azure/virtual-machines/sizes, the pages of each series.
MEMORY_GIB: dict[str, float] = {
    "Standard_DS1_v2": 3.5,
    "Standard_DS2_v2": 7,
    "Standard_DS3_v2": 14,
    "Standard_DS4_v2": 28,
    "Standard_DS5_v2": 56,
    "Standard_F2s_v2": 4,
    "Standard_F4s_v2": 8,
    "Standard_F8s_v2": 16,
    "Standard_F16s_v2": 32,
    "Standard_F32s_v2": 64,
    "Standard_F48s_v2": 96,
    "Standard_F64s_v2": 128,
    "Standard_F72s_v2": 144,
    "Standard_FX4mds": 84,
    "Standard_FX12mds": 252,
    "Standard_FX24mds": 504,
    "Standard_FX36mds": 756,
    "Standard_FX48mds": 1008,
    "Standard_E2s_v3": 16,
    "Standard_E4s_v3": 32,
    "Standard_E8s_v3": 64,
    "Standard_E16s_v3": 128,
    "Standard_E32s_v3": 256,
    "Standard_E48s_v3": 384,
    "Standard_E64s_v3": 432,
    "Standard_NC4as_T4_v3": 28,
    "Standard_NC8as_T4_v3": 56,
    "Standard_NC16as_T4_v3": 110,
    "Standard_NC64as_T4_v3": 440,
    "Standard_NC6s_v3": 112,
    "Standard_NC12s_v3": 224,
    "Standard_NC24s_v3": 448,
    "Standard_NC24ads_A100_v4": 220,
    "Standard_NC48ads_A100_v4": 440,
    "Standard_NC96ads_A100_v4": 880,
    **{f"Standard_D{cores}{kind}_v4": cores * 4 for cores in (2, 4, 8, 16, 32, 48, 64, 96) for kind in ("a", "as")},
}
DEFAULT = "Standard_DS3_v2"
_CPU_CHOICES = ("Standard_DS2_v2", "Standard_DS3_v2", "Standard_E4s_v3", "Standard_E8s_v3", "Standard_E16s_v3")


def memory(name: str) -> float | None:
    """GiB of an instance type, upper and lower case being one; None for a type that is not in the table."""
    return {known.lower(): gib for known, gib in MEMORY_GIB.items()}.get(name.lower())


def smallest(gib: float) -> str | None:
    """A common CPU type with at least that many GiB, or None."""
    return next((name for name in _CPU_CHOICES if MEMORY_GIB[name] >= gib), None)
