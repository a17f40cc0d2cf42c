//! A router with TLS and keys under `baton up`: the key that the command line makes lets in, and nothing else does.

use std::fs;
use std::time::Duration;

use baton_integration::access::{new_key, write_secret};
use baton_integration::process::eventually;
use baton_integration::{Fleet, FleetOptions};
use reqwest::StatusCode;
use serde_json::{Value, json};

const ONE: &str = "  - { name: all, role: both, kv: { memory: 16MiB } }\n";
const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_router_with_tls_and_keys_serves_whoever_has_a_key() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let certified = rcgen::generate_simple_self_signed(["router.example".to_owned()]).unwrap();
    fs::write(at("router.pem"), certified.cert.pem()).unwrap();
    write_secret(&at("router.key"), &certified.signing_key.serialize_pem());
    let (key, line) = new_key("acme");
    write_secret(&at("keys.yaml"), &format!("version: 1\ntenants:\n- name: acme\n  keys:\n  {line}\n"));
    let files = folder.path().display();
    let mut options = FleetOptions::tiny(ONE);
    options.document = options.document.replace(
        "listen: 127.0.0.1:0 }",
        &format!(
            "listen: 127.0.0.1:0, tls: {{ cert_file: {files}/router.pem, key_file: {files}/router.key }}, auth: {{ keys_file: {files}/keys.yaml }} }}"
        ),
    );
    let fleet = Fleet::start(options).await;
    assert!(fleet.ready.starts_with("ready https://127.0.0.1:"), "{}", fleet.ready);

    let client = baton_conductor::http::builder_believing(&at("router.pem")).unwrap().build().unwrap();
    let ask = async |key: Option<&str>| {
        let body = json!({ "model": "tiny", "prompt": "Hello", "max_tokens": 2 });
        let request = client.post(format!("{}/v1/completions", fleet.router)).json(&body);
        let request = key.into_iter().fold(request, |request, key| request.bearer_auth(key));
        let answer = request.send().await.unwrap();
        (answer.status(), answer.json::<Value>().await.unwrap())
    };
    let (status, answer) = ask(Some(&key)).await;
    assert_eq!((status, &answer["usage"]["completion_tokens"]), (StatusCode::OK, &json!(2)), "{answer}");
    let (status, answer) = ask(None).await;
    assert_eq!((status, &answer["error"]["code"]), (StatusCode::UNAUTHORIZED, &json!("missing_api_key")));
    let (other, _) = new_key("acme");
    let (status, answer) = ask(Some(&other)).await;
    assert_eq!((status, &answer["error"]["code"]), (StatusCode::UNAUTHORIZED, &json!("invalid_api_key")));
    let stranger = baton_conductor::http::client().get(format!("{}/v1/models", fleet.router)).send().await;
    assert!(stranger.is_err(), "nobody vouches for this certificate");

    // A key that is taken out of the file stops counting, without a restart.
    write_secret(&at("keys.yaml"), "version: 1\ntenants:\n- name: acme\n  keys: []\n");
    eventually("the key is refused", PATIENCE, async || {
        (ask(Some(&key)).await.0 == StatusCode::UNAUTHORIZED).then_some(())
    })
    .await;
    fleet.stop().await;
}
