//! Network interfaces and RDMA devices, as the kernel lists them.

use std::path::{Path, PathBuf};

use super::Finding;

/// Every interface that could carry blocks to another host, and every RDMA device; a line of its own where there is none.
pub(super) fn findings() -> Vec<Finding> {
    let mut findings: Vec<Finding> =
        names("/sys/class/net").iter().filter_map(|dir| interface(dir)).collect();
    let rdma: Vec<Finding> = names("/sys/class/infiniband").iter().map(|dir| rdma_device(dir)).collect();
    if rdma.is_empty() {
        findings.push(Finding {
            kind: "nic",
            name: "rdma".to_owned(),
            works: false,
            detail: "the kernel has no RDMA device (EFA, InfiniBand, RoCE)".to_owned(),
            remedy: Some("on AWS an instance type with EFA and its driver; elsewhere rdma-core".to_owned()),
        });
    }
    findings.extend(rdma);
    findings
}

fn names(class: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(class) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// An interface with hardware behind it, or the loopback; tunnels and bridges are left out.
fn interface(dir: &Path) -> Option<Finding> {
    let name = dir.file_name()?.to_string_lossy().into_owned();
    if name != "lo" && !dir.join("device").exists() {
        return None;
    }
    let up = matches!(text(&dir.join("operstate")).as_deref(), Some("up" | "unknown"));
    let mtu = text(&dir.join("mtu")).unwrap_or_else(|| "?".to_owned());
    // A virtual machine's card reports -1, the loopback nothing at all.
    let speed = text(&dir.join("speed")).and_then(|mbit| mbit.parse::<i64>().ok()).filter(|mbit| *mbit > 0);
    let speed = speed.map_or_else(String::new, |mbit| format!(", {} Gb/s", mbit as f64 / 1000.0));
    let state = if up { "up" } else { "down" };
    let remedy = (!up).then(|| format!("ip link set {name} up"));
    Some(Finding { kind: "nic", name, works: up, detail: format!("{state}, mtu {mtu}{speed}"), remedy })
}

fn rdma_device(dir: &Path) -> Finding {
    let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let state = text(&dir.join("ports/1/state")).unwrap_or_else(|| "no port".to_owned());
    let rate = text(&dir.join("ports/1/rate")).map_or_else(String::new, |rate| format!(", {rate}"));
    let works = state.contains("ACTIVE");
    let remedy = (!works).then(|| "see `rdma link` for the state of its port".to_owned());
    Finding { kind: "nic", name, works, detail: format!("rdma, {state}{rate}"), remedy }
}

/// A one-line file of the kernel.
fn text(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
}
