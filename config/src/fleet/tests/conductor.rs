//! Who may speak with the conductor, and where it keeps the fleet.

use expect_test::expect;

use super::*;

fn conductor(keys: &str) -> String {
    with_head(&format!("conductor: {{ {keys} }}\npools: [{{ name: all, role: both }}]\n"))
}

#[test]
fn who_may_speak_with_the_conductor_is_read() {
    let open = parse(&conductor("listen: 127.0.0.1:7400")).unwrap().conductor;
    assert_eq!((open.guard.authenticates(), open.access), (false, ConductorAccess::default()));
    let token = parse(&conductor("listen: 10.0.0.7:7400, auth: { token_file: t }")).unwrap().conductor;
    assert!(token.guard.authenticates() && token.guard.tls.is_none());
    assert_eq!(token.endpoints, ["http://10.0.0.7:7400"]);
    assert_eq!(token.access.token_file.as_deref(), Some(Path::new("t")));
    let keys = "listen: 0.0.0.0:7400, allowed_addresses: [10.0.0.0/8, ::1], tls: { cert_file: c, key_file: k, client_ca_file: a, ca_file: b, client_cert_file: d, client_key_file: e }";
    let ConductorSpec { guard, access, endpoints, .. } = parse(&conductor(keys)).unwrap().conductor;
    assert!(guard.authenticates() && guard.token_file.is_none());
    assert_eq!(endpoints, ["https://127.0.0.1:7400"]);
    assert_eq!(
        guard.allowed_addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.0.0.0/8", "::1/128"]
    );
    assert_eq!(access.identity.map(|identity| identity.key_file).as_deref(), Some(Path::new("e")));
    assert_eq!(guard.tls.and_then(|tls| tls.client_ca_file).as_deref(), Some(Path::new("a")));
}

#[test]
fn a_conductor_that_anybody_reaches_asks_who_they_are() {
    faults(
        &conductor("listen: 0.0.0.0:7400"),
        &expect![[r#"
        fleet.yaml:3:22: conductor.listen: is 0.0.0.0:7400, where other hosts can connect, and nobody proves who they are
          remedy: add auth: { token_file: PATH } or tls: { cert_file: PATH, key_file: PATH, client_ca_file: PATH }, or listen on 127.0.0.1"#]],
    );
    faults(
        &conductor("listen: 10.0.0.7:7400, tls: { cert_file: c, key_file: k }"),
        &expect![[r#"
        fleet.yaml:3:22: conductor.listen: is 10.0.0.7:7400, where other hosts can connect, and nobody proves who they are
          remedy: add auth: { token_file: PATH } or tls: { cert_file: PATH, key_file: PATH, client_ca_file: PATH }, or listen on 127.0.0.1"#]],
    );
    faults(
        &conductor("listen: 10.0.0.7:7400, auth: { token: secret }"),
        &expect![[r#"
        fleet.yaml:3:43: conductor.auth.token_file: is missing
          remedy: write `token_file:` with the path of a file of at least 32 random characters
        fleet.yaml:3:45: conductor.auth.token: would hold a secret in clear text
          remedy: write the secret into a file and give its path as `token_file:`
        2 faults in fleet.yaml"#]],
    );
    faults(
        &conductor("tls: { cert_file: c, client_key_file: k }"),
        &expect![[r#"
        fleet.yaml:3:19: conductor.tls.key_file: is missing
          remedy: write `key_file:` with the path of the PEM file of the key
        fleet.yaml:3:19: conductor.tls.client_cert_file: is missing
          remedy: write `client_cert_file:` with the path of the PEM file of the certificate
        2 faults in fleet.yaml"#]],
    );
    faults(
        &conductor("tls: { client_ca_file: a }, allowed_addresses: []"),
        &expect![[r#"
        fleet.yaml:3:12: conductor.allowed_addresses: is empty: no worker could register
          remedy: name at least one range, or remove the key
        fleet.yaml:3:37: conductor.tls.client_ca_file: asks clients for certificates, but the conductor itself has none
          remedy: add cert_file: PATH and key_file: PATH
        2 faults in fleet.yaml"#]],
    );
    faults(
        &conductor(
            "endpoints: [https://a, http://b:1], tls: { cert_file: c, key_file: k }, allowed_addresses: [10.0.0.1/8, 10/8, ::/200]",
        ),
        &expect![[r#"
            fleet.yaml:3:37: conductor.endpoints[1]: is plain HTTP, but the conductor speaks TLS
              remedy: write https://b:1
            fleet.yaml:3:106: conductor.allowed_addresses[0]: has bits beyond its prefix
              remedy: write 10.0.0.0/8
            fleet.yaml:3:118: conductor.allowed_addresses[1]: is 10/8, which is not a range of addresses, like 10.0.0.0/8
              remedy: write a range of addresses, like 10.0.0.0/8
            fleet.yaml:3:124: conductor.allowed_addresses[2]: is ::/200, which is not a range of addresses, like 10.0.0.0/8
              remedy: write a range of addresses, like 10.0.0.0/8
            4 faults in fleet.yaml"#]],
    );
}

#[test]
fn etcd_is_reached_with_tls_or_without() {
    let text = with_head(
        "conductor: { store: { etcd: { endpoints: [http://a:2379, https://b:2379], tls: { ca_file: ca, cert_file: c } } } }
pools: [{ name: all, role: both }]\n",
    );
    faults(
        &text,
        &expect![[r#"
        fleet.yaml:3:43: conductor.store.etcd.endpoints[0]: is plain HTTP beside a `tls` section
          remedy: write https, or remove `tls`
        fleet.yaml:3:80: conductor.store.etcd.tls.key_file: is missing
          remedy: write `key_file:` with the path of the certificate's key
        2 faults in fleet.yaml"#]],
    );
    let text = with_head(
        "conductor: { store: { etcd: { endpoints: [https://b:2379] } } }
pools: [{ name: all, role: both }]\n",
    );
    faults(
        &text,
        &expect![[r#"
        fleet.yaml:3:43: conductor.store.etcd.endpoints[0]: is HTTPS, but no authority is known
          remedy: add `tls: { ca_file: PATH }`"#]],
    );
}
