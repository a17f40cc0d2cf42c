//! Pools that follow the load.

use expect_test::expect;

use super::*;

/// A pool with every kind of default of autoscaling.
pub(super) const SCALING: &str = "pools:
  - { name: all, role: both, autoscale: { scaler: webhook, webhook: { url: \"https://scaler.example\" } } }
  - name: decode
    role: decode
    replicas: 2
    autoscale: { max: 4, dry_run: true, scaler: kubernetes, target: { itl_ms: 40 }, kubernetes: { kind: Deployment, name: decode } }
  - { name: prefill, role: prefill, autoscale: { min: 0, max: 8, scaler: process, target: { queue_wait_ms: 100, ttft_ms: 900 } } }
";

#[test]
fn explains_autoscaling() {
    let fleet = parse(&with_head(SCALING)).unwrap();
    let text = explain::explain(&fleet);
    let from = text.find("autoscaling\n").unwrap();
    let section = text[from..].split("\ntransfer paths").next().unwrap();
    expect![[r#"
        autoscaling
          all: 1 to 1 workers, by POST https://scaler.example
            grows when prompts wait 250 ms or 80 % of the KV blocks are held, 10 % over for 3000 ms
            shrinks when fewer would have done for 300000 ms; they drain first
          decode: 1 to 4 workers, by the scale of Deployment decode in namespace default (dry run: only told)
            grows when 80 % of the KV blocks are held or a token takes 40 ms, 10 % over for 3000 ms
            shrinks when fewer would have done for 300000 ms; they drain first
          prefill: 0 to 8 workers, by baton up
            grows when prompts wait 100 ms or the first token takes 900 ms, 10 % over for 3000 ms
            shrinks when fewer would have done for 300000 ms; they drain first
    "#]]
    .assert_eq(section);
    let [all, decode, prefill] = fleet.pools.as_slice() else { panic!("three pools") };
    let scale = |pool: &Pool| pool.autoscale.clone().unwrap();
    assert_eq!(scale(all).target, Autoscale::new(Role::Both, 1, 1).target);
    assert_eq!((scale(decode).min, scale(decode).max, scale(decode).dry_run), (1, 4, true));
    assert_eq!(scale(decode).target.queue_wait, None, "decode workers have no queue of prompts");
    assert_eq!(scale(prefill).target.kv_percent, None);
    assert_eq!(scale(prefill).target.ttft, Some(Duration::from_millis(900)));
}

#[test]
fn faults_of_autoscaling_have_remedies() {
    let text = "pools:
  - name: a
    role: prefill
    autoscale: { min: 3, max: 2, target: { kv_occupancy: 80, ttft_ms: 0 }, scaler: kubernetes }
  - name: b
    role: decode
    autoscale: { target: { queue_wait_ms: 5 }, scaler: webhook, webhook: { url: \"http://h\", ca_file: ca.pem, secret: x } }
  - name: c
    role: both
    autoscale: { scaler: process, kubernetes: { kind: DaemonSet, name: Upper_Case }, tolerance: 5, down_after_ms: 10 }
  - name: d
    role: both
    autoscale: { scaler: kubernetes, kubernetes: { kind: DaemonSet, name: Upper_Case, namespace: \"a.b\" } }
";
    faults(
        &with_head(text),
        &expect![[r#"
        fleet.yaml:6:16: pools[0].autoscale.kubernetes: is missing
          remedy: write `kubernetes:` with the object to scale, such as { kind: Deployment, name: prefill }
        fleet.yaml:6:23: pools[0].autoscale.min: is 3, more than max, which is 2
          remedy: lower min or raise max
        fleet.yaml:6:58: pools[0].autoscale.target.kv_occupancy: is a target of decode workers, which this pool has none of
          remedy: remove it, or set queue_wait_ms or ttft_ms instead
        fleet.yaml:6:71: pools[0].autoscale.target.ttft_ms: is 0, which is not a whole number of milliseconds from 1 to 600000
          remedy: write a whole number of milliseconds from 1 to 600000
        fleet.yaml:9:43: pools[1].autoscale.target.queue_wait_ms: is a target of prefill workers, which this pool has none of
          remedy: remove it, or set kv_occupancy or itl_ms instead
        fleet.yaml:9:102: pools[1].autoscale.webhook.ca_file: is given, but the url is not https
          remedy: write https:// in url
        fleet.yaml:9:110: pools[1].autoscale.webhook.secret: would hold a secret in clear text
          remedy: write the secret into a file and give its path as `secret_file:`
        fleet.yaml:12:47: pools[2].autoscale.kubernetes: is given, but the scaler is process
          remedy: write scaler: kubernetes, or remove the section
        fleet.yaml:12:86: pools[2].autoscale.tolerance: unknown key `tolerance`
          remedy: remove it; the keys here are min, max, target, tolerance_percent, up_after_ms, down_after_ms, dry_run, scaler, kubernetes, webhook
        fleet.yaml:12:115: pools[2].autoscale.down_after_ms: is 10, which is not a whole number from 1000 to 86400000
          remedy: write a whole number from 1000 to 86400000 (the default is 300000)
        fleet.yaml:15:58: pools[3].autoscale.kubernetes.kind: is DaemonSet, which is not one of Deployment, StatefulSet
          remedy: write one of Deployment, StatefulSet
        fleet.yaml:15:75: pools[3].autoscale.kubernetes.name: is Upper_Case, which is not a name of a-z, 0-9, '-' and '.'
          remedy: write a name of a-z, 0-9, '-' and '.'
        fleet.yaml:15:98: pools[3].autoscale.kubernetes.namespace: is a.b in quotes, which is not a name of at most 63 characters of a-z, 0-9 and '-'
          remedy: write a name of at most 63 characters of a-z, 0-9 and '-' (the default is default)
        13 faults in fleet.yaml"#]],
    );
    let text = "pools:
  - { name: p, role: prefill, autoscale: { max: 2, scaler: kubernetes, kubernetes: { kind: Deployment, name: x } } }
  - { name: d, role: decode, autoscale: { min: 0, max: 2, scaler: kubernetes, kubernetes: { kind: Deployment, name: x } } }
";
    faults(
        &with_head(text),
        &expect![[r#"
        fleet.yaml:5:48: pools[1].autoscale.min: is 0, and no other pool that generates keeps a worker: the fleet could scale to nothing
          remedy: write min: 1
        fleet.yaml:5:117: pools[1].autoscale.kubernetes.name: is x, which pool p scales too
          remedy: give each pool an object of its own
        2 faults in fleet.yaml"#]],
    );
}
