"""Renders every kustomization of examples/kubernetes and checks what comes out.

Usage: check.py EXAMPLES BATON KUBECTL_DIR

Each object is validated against the schemas of the oldest and the newest Kubernetes that the examples are for. Beyond
schemas: what is mounted exists, selectors select something, pods outlive the drain they are given, secrets are closed to
strangers, the conductor may change sizes and nothing else, and `baton check` takes every fleet file.
"""

import copy
import io
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile

import kubernetes_validate
import yaml

# preStop `sleep` and sidecar containers came by default with the first of them.
VERSIONS = ["1.30", kubernetes_validate.latest_version()]
# Kinds that no schema is at hand for, with the keys their examples must have.
CUSTOM = {("keda.sh/v1alpha1", "ScaledObject"): ["scaleTargetRef", "minReplicaCount", "maxReplicaCount", "triggers"]}
# Seconds a pod gets beyond its drain: to tell the conductor and close.
CLOSE_MARGIN_S = 10
# Overlays that say themselves that they need more than this build.
AHEAD = {"overlays/trainium-gpu-vllm"}


def kubectl(directory):
    """The kubectl on the path of the machine, else the one that the package carries."""
    target = directory / "kubectl"
    if target.exists():
        return target
    archives = list(directory.glob("**/lambda-layer-kubectl*.jsii.tgz"))
    assert archives, f"no package with kubectl below {directory}: run integration/test.sh"
    with tarfile.open(archives[0]) as package:
        layer = package.extractfile("package/lib/layer.zip").read()
    binary = zipfile.ZipFile(io.BytesIO(layer)).read("kubectl/kubectl")
    part = directory / f"kubectl.{os.getpid()}"
    part.write_bytes(binary)
    part.chmod(0o755)
    part.rename(target)
    return target


def render(kubectl, directory):
    done = subprocess.run([kubectl, "kustomize", directory], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{directory} does not render: {done.stderr}"
    assert not done.stderr, f"{directory}: {done.stderr}"
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def named(document):
    return f"{document['kind']} {document['metadata']['name']}"


def validate(document):
    expected = CUSTOM.get((document["apiVersion"], document["kind"]))
    if expected is not None:
        for key in expected:
            assert key in document["spec"], f"{named(document)} lacks spec.{key}"
        return
    for version in VERSIONS:
        kubernetes_validate.validate(document, version, strict=True)


def is_refused(document):
    try:
        validate(document)
    except kubernetes_validate.ValidationError:
        return True
    return False


def control(document):
    """The checker must be able to say no."""
    wrong = copy.deepcopy(document)
    wrong["spec"]["replicas"] = "two"
    assert is_refused(wrong), "a text was taken for a number of replicas"
    unknown = copy.deepcopy(document)
    unknown["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    assert is_refused(unknown), "a key that does not exist was taken"


def of(documents, *kinds):
    return [document for document in documents if document["kind"] in kinds]


def selected(selector, documents):
    wanted = selector.get("matchLabels", {}).items()
    pods = [workload["spec"]["template"]["metadata"]["labels"] for workload in of(documents, "Deployment", "StatefulSet")]
    return any(wanted <= labels.items() for labels in pods)


def check_mounts(workload, config_maps):
    pod = workload["spec"]["template"]["spec"]
    claims = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for container in pod.get("initContainers", []) + pod["containers"]:
        for mount in container.get("volumeMounts", []):
            assert mount["name"] in volumes.keys() | claims, f"{named(workload)} mounts {mount['name']}, which is no volume"
    for volume in volumes.values():
        if "configMap" in volume:
            assert volume["configMap"]["name"] in config_maps, f"{named(workload)}: no ConfigMap {volume['configMap']}"
        if "secret" in volume:
            assert volume["secret"].get("defaultMode") == 0o440, f"{named(workload)}: {volume['name']} is open to all"
            assert pod["securityContext"].get("fsGroup"), f"{named(workload)} cannot read {volume['name']}"


def check_grace(workload, fleet):
    """A pod is not killed before the drain it was promised is over."""
    pod = workload["spec"]["template"]["spec"]
    labels = workload["spec"]["template"]["metadata"]["labels"]
    name = labels["app.kubernetes.io/name"]
    if name == "baton-worker":
        pools = {pool["name"]: pool for pool in fleet["pools"]}
        assert labels["baton/pool"] in pools, f"{named(workload)}: no pool {labels['baton/pool']} in the fleet file"
        pool = pools[labels["baton/pool"]]
        assert labels["baton/role"] == pool["role"], f"{named(workload)} has another role than its pool"
        limits = pool.get("limits", {})
        settle_ms = 0
    elif name == "baton-router":
        limits = fleet["router"].get("limits", {})
        settle_ms = limits.get("drain_settle_ms", 0)
    else:
        return
    stop = pod["containers"][0].get("lifecycle", {}).get("preStop", {})
    needed = limits.get("drain_grace_ms", 120_000) / 1000 + settle_ms / 1000 + CLOSE_MARGIN_S
    needed += stop.get("sleep", {}).get("seconds", 0)
    given = pod["terminationGracePeriodSeconds"]
    assert given >= needed, f"{named(workload)} gets {given} s to end and may need {needed} s"


def check_probes(workload):
    for container in workload["spec"]["template"]["spec"]["containers"]:
        ports = {port["name"] for port in container["ports"]}
        for probe in ("readinessProbe", "livenessProbe"):
            get = container[probe]["httpGet"]
            assert get["path"] == {"readinessProbe": "/readyz", "livenessProbe": "/livez"}[probe]
            assert get["port"] in ports, f"{named(workload)}: {probe} asks a port that is not there"


def check_fleet(name, text, baton, examples):
    """`baton check` takes the file as a pod would read it."""
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "fleet.yaml"
        path.write_text(text)
        # The image has the models where it works; here they are below `examples`.
        environment = {"PATH": os.environ["PATH"], "POD_IP": "10.1.2.3"}
        command = [baton, "check", path]
        done = subprocess.run(
            command, cwd=examples.parent, env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, f"baton check {name}/fleet.yaml: {done.stderr}{done.stdout}"
    missing = [line.strip() for line in done.stdout.splitlines() if "; cannot start: " in line]
    if name in AHEAD:
        missing = [line for line in missing if "the engine " not in line]
    assert not missing, f"{name}/fleet.yaml cannot start with this build: {missing}"


def check_overlay(name, documents, baton, examples):
    config_maps = {document["metadata"]["name"]: document for document in of(documents, "ConfigMap")}
    fleets = [document["data"]["fleet.yaml"] for document in config_maps.values()]
    assert len(fleets) == 1, f"{name} has {len(fleets)} fleet files"
    check_fleet(name, fleets[0], baton, examples)
    fleet = yaml.safe_load(fleets[0])
    workloads = of(documents, "Deployment", "StatefulSet")
    assert {"conductor", "router"} <= {workload["metadata"]["name"] for workload in workloads}
    deployments = {workload["metadata"]["name"] for workload in of(documents, "Deployment")}
    for workload in workloads:
        check_mounts(workload, config_maps)
        check_grace(workload, fleet)
        check_probes(workload)
    for pool in fleet["pools"]:
        target = pool.get("autoscale", {}).get("kubernetes")
        if target:
            assert target["kind"] == "Deployment" and target["name"] in deployments, f"{name}: {target} is not there"
    for document in of(documents, "PodDisruptionBudget"):
        assert selected(document["spec"]["selector"], documents), f"{name}: {named(document)} is about nobody"
    for document in of(documents, "NetworkPolicy"):
        assert selected(document["spec"]["podSelector"], documents), f"{name}: {named(document)} is about nobody"
    for document in of(documents, "Service"):
        selector = {"matchLabels": document["spec"]["selector"]}
        assert selected(selector, documents), f"{name}: {named(document)} leads nowhere"
    conductors = next(w for w in workloads if w["metadata"]["name"] == "conductor")["spec"]["replicas"]
    embedded = "etcd" not in (fleet["conductor"].get("store") or {})
    assert not embedded or conductors == 1, f"{name}: {conductors} conductors on an embedded store"
    endpoints = fleet["conductor"]["endpoints"]
    assert len(endpoints) == conductors, f"{name}: {conductors} conductors and {len(endpoints)} endpoints"
    for document in of(documents, "Role"):
        for rule in document["rules"]:
            assert all(resource.endswith("/scale") for resource in rule["resources"]), f"{named(document)} may do more"
            assert "*" not in rule["verbs"]
    return deployments


def main():
    examples, baton, tools = (pathlib.Path(argument).resolve() for argument in sys.argv[1:4])
    tool = kubectl(tools)
    checked, deployments, scaled = 0, {}, []
    for kustomization in sorted(examples.glob("**/kustomization.yaml")):
        name = str(kustomization.parent.relative_to(examples))
        documents = render(tool, kustomization.parent)
        assert documents, f"{name} is empty"
        for document in documents:
            try:
                validate(document)
            except kubernetes_validate.ValidationError as fault:
                raise AssertionError(f"{name}: {named(document)}: {list(fault.path)}: {fault.message}") from fault
            in_namespace = document["kind"] == "Namespace" or document["metadata"].get("namespace") == "baton"
            assert in_namespace, f"{name}: {named(document)} is in no namespace"
            checked += 1
        if name.startswith("overlays/"):
            deployments[name] = check_overlay(name, documents, baton, examples)
            control(of(documents, "Deployment")[0])
        elif name.startswith("autoscaling/"):
            scaled += [(name, document["spec"]["scaleTargetRef"]["name"]) for document in documents]
    assert {"overlays/small", "overlays/etcd"} <= deployments.keys(), "overlays are missing"
    for name, target in scaled:
        assert target in deployments["overlays/etcd"], f"{name}: no Deployment {target}"
    print(f"{checked} objects of {len(deployments)} overlays are good")


if __name__ == "__main__":
    main()
