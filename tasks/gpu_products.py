"""What each GPU type is called where machines are asked for: labels of Kubernetes nodes, EC2 instance types."""

from collections.abc import Mapping, Sequence

from inference.hardware import GpuType
from tasks.job_variables import ProvisionError

NODE_LABEL = "nvidia.com/gpu.product"
"""The label that NVIDIA's feature discovery gives a node: the driver's name of the card, with dashes."""

# Where a type has several names any of them will do: EC2's g5 nodes have the A10G.
PRODUCTS: Mapping[str, tuple[str, ...]] = {
    "T4": ("Tesla-T4",),
    "L4": ("NVIDIA-L4",),
    "A10": ("NVIDIA-A10", "NVIDIA-A10G"),
    "L40S": ("NVIDIA-L40S",),
    "A100-40": ("NVIDIA-A100-SXM4-40GB",),
    "A100-80": ("NVIDIA-A100-SXM4-80GB",),
    "H100-PCIE": ("NVIDIA-H100-PCIe",),
    "H100-NVL": ("NVIDIA-H100-NVL",),
    "H100": ("NVIDIA-H100-80GB-HBM3",),
    "H200": ("NVIDIA-H200",),
    "B200": ("NVIDIA-B200",),
}
INSTANCES: Mapping[str, str] = {
    "T4": "g4dn.*",
    "L4": "g6.*",
    "A10": "g5.*",
    "L40S": "g6e.*",
    "A100-40": "p4d.*",
    "A100-80": "p4de.*",
    "H100": "p5.*",
    "H200": "p5e.*",
    "B200": "p6-b200.*",
}


def within_reach(
    known: Sequence[GpuType],
    provider: str,
    *,
    selector: Mapping[str, str] | None,
    is_placed: bool,
) -> list[GpuType]:
    """The GPU types that a provider can be asked for.

    Args:
        known: to choose from.
        provider: how machines are got.
        selector: of Kubernetes nodes, if the platform's owner fixes one: one by product leaves that type, any other
            may mean every type.
        is_placed: whether the owner has constraints of their own for ECS.
    """
    names = {gpu.name for gpu in known}
    if provider == "kubernetes" and not selector:
        names = set(PRODUCTS)
    elif provider == "kubernetes" and selector is not None and NODE_LABEL in selector:
        names = {name for name, labels in PRODUCTS.items() if selector[NODE_LABEL] in labels}
    elif provider == "ecs" and not is_placed:
        names = set(INSTANCES)
    return [gpu for gpu in known if gpu.name in names] or list(known)


def node_choice(gpu: str) -> dict[str, object]:
    """The job variables that place a Kubernetes replica on nodes with this GPU type. Raises ProvisionError."""
    _check(gpu, PRODUCTS, "node_selector", "node label")
    labels = PRODUCTS[gpu]
    if len(labels) == 1:
        return {"node_selector": {NODE_LABEL: labels[0]}}
    either = {"key": NODE_LABEL, "operator": "In", "values": list(labels)}
    required = {"nodeSelectorTerms": [{"matchExpressions": [either]}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
    return {"node_selector": {}, "affinity": affinity}


def instance_types(gpu: str) -> str:
    """The pattern of EC2 instance types that carry this GPU type. Raises ProvisionError."""
    _check(gpu, INSTANCES, "placement_constraints", "EC2 instance type")
    return INSTANCES[gpu]


def _check(gpu: str, table: Mapping[str, object], setting: str, what: str) -> None:
    if gpu not in table:
        raise ProvisionError(
            f"no {what} is known for {gpu}; give job variable {setting}, or use one of {', '.join(table)}"
        )
