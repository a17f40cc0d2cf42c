//! Network interfaces and RDMA devices, as the kernel lists them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::Finding;

/// Every interface that could carry blocks to another host, and every RDMA device; a line of its own where there is none.
pub(super) fn findings() -> Vec<Finding> {
    let [v4, v6] = ["/proc/net/route", "/proc/net/ipv6_route"]
        .map(|table| std::fs::read_to_string(table).unwrap_or_default());
    let routed = routed(&v4, &v6);
    let mut findings: Vec<Finding> =
        names("/sys/class/net").iter().filter_map(|dir| interface(dir, &routed)).collect();
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

/// How an interface leads to other hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Routed {
    /// To a network. That a single address is behind it says nothing: so it is with the containers of this host.
    Network,
    /// To everybody.
    Default,
}

/// The interfaces of the kernel's two tables of routes.
fn routed(v4: &str, v6: &str) -> BTreeMap<String, Routed> {
    let v4 = v4.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (name, mask) = (*fields.first()?, u32::from_str_radix(fields.get(7)?, 16).ok()?);
        (mask != u32::MAX).then_some((name, mask == 0))
    });
    let v6 = v6.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (name, target) = (*fields.get(9)?, *fields.first()?);
        let prefix_bits = u32::from_str_radix(fields.get(1)?, 16).ok()?;
        // Every interface has routes to its link and to groups.
        let everywhere = target.starts_with("fe80") || target.starts_with("ff");
        (prefix_bits != 128 && !everywhere).then_some((name, prefix_bits == 0))
    });
    let mut routed = BTreeMap::new();
    for (name, is_default) in v4.chain(v6) {
        let leads = if is_default { Routed::Default } else { Routed::Network };
        let known = routed.entry(name.to_owned()).or_insert(leads);
        *known = leads.max(*known);
    }
    routed
}

/// An interface with hardware behind it, or one that leads to other hosts (a container has no other), or the loopback.
/// Bridges mostly lead to containers of this host.
fn interface(dir: &Path, routed: &BTreeMap<String, Routed>) -> Option<Finding> {
    let name = dir.file_name()?.to_string_lossy().into_owned();
    let leads = routed.get(&name).copied();
    let out = if dir.join("bridge").exists() { leads == Some(Routed::Default) } else { leads.is_some() };
    if name != "lo" && !dir.join("device").exists() && !out {
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

#[cfg(test)]
mod tests {
    use super::*;

    const V4: &str = "\
Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT
eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
bond0.7\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
cali12\t0500A8C0\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0
";
    const V6: &str = "\
fe800000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001   cali34
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003      br0
";

    #[test]
    fn what_leads_to_other_hosts_is_shown_also_without_hardware() {
        let class = tempfile::tempdir().unwrap();
        let names =
            ["lo", "eth0", "bond0.7", "docker0/bridge", "br0/bridge", "cali12", "cali34", "ens5/device"];
        for name in names {
            std::fs::create_dir_all(class.path().join(name)).unwrap();
        }
        let (class, routed) = (class.path().display().to_string(), routed(V4, V6));
        let shown: Vec<String> = super::names(&class)
            .iter()
            .filter_map(|dir| interface(dir, &routed).map(|finding| finding.name))
            .collect();
        assert_eq!(shown, ["bond0.7", "br0", "ens5", "eth0", "lo"]);
    }
}
