pub(super) mod issuer;

use baton_config::fleet::{JwtAlgorithm, JwtSpec};
use futures_util::FutureExt as _;
use http::HeaderValue;
use serde_json::{Value, json};

use super::*;
use issuer::{Issuer, RSA_TOKEN, b64};

fn headers(name: &'static str, value: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(name, HeaderValue::from_str(value).unwrap());
    headers
}

/// Keys and known signers are decided on without waiting.
fn ask(auth: &Auth, headers: &HeaderMap) -> Result<Arc<Principal>, Refusal> {
    auth.authenticate(headers).now_or_never().expect("at once")
}

fn bearer(credential: &str) -> HeaderMap {
    headers("authorization", &format!("Bearer {credential}"))
}

fn write(directory: &tempfile::TempDir, name: &str, text: &str) -> std::path::PathBuf {
    let path = directory.path().join(name);
    std::fs::write(&path, text).unwrap();
    path
}

/// A guard over two tenants; gives the key of the first.
fn guarded(isolation: Isolation) -> (Auth, String, Arc<Metrics>) {
    let directory = tempfile::tempdir().unwrap();
    let (acme, old) = (mint("acme").unwrap(), mint("acme").unwrap());
    let expired = old.line.replace(" }", ", expires: 2020-01-01 }");
    let text = format!(
        "version: 1\ntenants:\n- name: acme\n  weight: 3\n  limits: {{ concurrency: 7 }}\n  keys:\n  {}\n  {expired}\n- name: other\n",
        acme.line
    );
    let spec = AuthSpec::new(write(&directory, "keys.yaml", &text), isolation);
    let metrics = Arc::new(Metrics::new().unwrap());
    let auth = Auth::new(Some(&spec), Arc::clone(&metrics)).unwrap();
    let expired = ask(&auth, &bearer(&old.key)).unwrap_err();
    assert!(matches!(expired, Refusal::Unauthorized { code: "expired_api_key", .. }), "{expired:?}");
    (auth, acme.key, metrics)
}

#[test]
fn a_key_is_good_whole_and_nothing_less() {
    let (auth, key, _) = guarded(Isolation::Tenant);
    for headers in
        [bearer(&key), headers("x-api-key", &key), headers("authorization", &format!("bEARER  {key} "))]
    {
        let principal = ask(&auth, &headers).unwrap();
        assert_eq!((&*principal.tenant.name, principal.tenant.weight), ("acme", 3));
        assert_eq!(principal.quota.concurrency, Some(7));
    }
    let mut last = key.clone();
    let changed = if last.pop() == Some('0') { '1' } else { '0' };
    last.push(changed);
    let id = key.split('-').nth(1).unwrap();
    for bad in [
        last.as_str(),
        &key[..key.len() - 1],
        &format!("{key}0"),
        &format!("bk-{id}-"),
        &format!("bk-{id}"),
        "bk-",
        "bk--",
        "sk-abcdef",
        "bk-ffffffffffff-00",
        "a.b.c",
    ] {
        let refused = ask(&auth, &bearer(bad)).unwrap_err();
        assert_eq!(refused.status().as_u16(), 401, "{bad}");
        let body = String::from_utf8(refused.body(crate::routes::Dialect::OpenAi).to_vec()).unwrap();
        assert!(body.contains("\"code\":\"invalid_api_key\"") && !body.contains(bad), "{body}");
    }
}

#[test]
fn what_is_no_bearer_key_is_refused() {
    let (auth, key, metrics) = guarded(Isolation::Tenant);
    let mut twice = bearer(&key);
    twice.append("authorization", HeaderValue::from_str(&format!("Bearer {key}")).unwrap());
    let mut twice_x = headers("x-api-key", &key);
    twice_x.append("x-api-key", HeaderValue::from_static("another"));
    let mut binary = HeaderMap::new();
    binary.insert("authorization", HeaderValue::from_bytes(b"Bearer \xff\xfe").unwrap());
    let long = "x".repeat(CREDENTIAL_MAX_BYTES + 1);
    for (headers, code) in [
        (HeaderMap::new(), "missing_api_key"),
        (headers("authorization", "Bearer "), "missing_api_key"),
        (headers("authorization", "Bearer"), "missing_api_key"),
        (headers("x-api-key", ""), "missing_api_key"),
        (headers("authorization", &key), "invalid_api_key"),
        (headers("authorization", &format!("Basic {key}")), "invalid_api_key"),
        (twice, "invalid_api_key"),
        (twice_x, "invalid_api_key"),
        (binary, "invalid_api_key"),
        (bearer(&long), "invalid_api_key"),
    ] {
        let refused = ask(&auth, &headers).unwrap_err();
        assert!(matches!(refused, Refusal::Unauthorized { code: told, .. } if told == code), "{refused:?}");
    }
    let text = metrics.render();
    assert!(text.contains("baton_router_auth_denied_total{reason=\"missing\"} 4"), "{text}");
    let shown = format!("{auth:?}");
    assert!(!shown.contains(&key[16..]), "no secret in {shown}");
}

#[test]
fn salts_separate_what_is_to_be_separate() {
    let (auth, key, _) = guarded(Isolation::Tenant);
    let principal = ask(&auth, &bearer(&key)).unwrap();
    let salt = auth.salt(&principal).unwrap();
    assert_eq!(salt, auth.salt(&principal).unwrap());
    assert_eq!(salt, tenant_salt("acme"), "the same in every router");
    assert!(salt != 0 && tenant_salt("other") != salt);
    let (auth, ..) = guarded(Isolation::Request);
    assert_ne!(auth.salt(&principal).unwrap(), auth.salt(&principal).unwrap());
    let (auth, ..) = guarded(Isolation::None);
    assert_eq!(auth.salt(&principal).unwrap(), 0);
}

#[test]
fn labels_of_metrics_are_bounded() {
    let directory = tempfile::tempdir().unwrap();
    let tenants: String = (0..LABELS_MAX + 50).map(|n| format!("- name: t{n}\n")).collect();
    let spec = AuthSpec::new(
        write(&directory, "keys.yaml", &format!("version: 1\ntenants:\n{tenants}")),
        Isolation::None,
    );
    let auth = Auth::new(Some(&spec), Arc::new(Metrics::new().unwrap())).unwrap();
    let Mode::Guarded(guard) = &auth.mode else { panic!("guarded") };
    let directory = guard.directory.read().unwrap().clone();
    let label = |name: &str| directory.of_tenant(name).unwrap().tenant.label.to_string();
    assert_eq!((label("t0").as_str(), label("t149").as_str()), ("t0", "other"));
}

const ISSUER: &str = "https://id.example";

fn provider(issuer: &Issuer, algorithms: &[JwtAlgorithm]) -> Result<Provider, JwksError> {
    let mut spec = JwtSpec::new(JwksSource::File("jwks.json".into()), ISSUER.to_owned(), "baton".to_owned());
    spec.algorithms = algorithms.to_vec();
    Provider::parse(issuer.jwks().as_bytes(), "jwks.json", &spec)
}

const ALL: [JwtAlgorithm; 3] = [JwtAlgorithm::Rs256, JwtAlgorithm::Es256, JwtAlgorithm::EdDsa];

#[test]
fn tokens_of_every_kind_of_key_are_taken() {
    let issuer = Issuer::new();
    let provider = provider(&issuer, &ALL).unwrap();
    assert_eq!(provider.tenant(RSA_TOKEN), Ok("acme".to_owned()));
    let claims =
        json!({ "iss": ISSUER, "aud": ["x", "baton"], "exp": unix_seconds() + 60, "tenant": "acme" });
    for (algorithm, id) in [("ES256", "ec"), ("EdDSA", "ed")] {
        let named = issuer.token(&json!({ "alg": algorithm, "kid": id }), &claims);
        assert_eq!(provider.tenant(&named), Ok("acme".to_owned()), "{algorithm}");
        let unnamed = issuer.token(&json!({ "alg": algorithm }), &claims);
        assert_eq!(provider.tenant(&unnamed), Ok("acme".to_owned()), "{algorithm}");
    }
}

#[test]
fn claims_are_checked_with_leeway() {
    let issuer = Issuer::new();
    let provider = provider(&issuer, &ALL).unwrap();
    let now = unix_seconds();
    let good = json!({ "iss": ISSUER, "aud": "baton", "exp": now + 60, "nbf": now, "tenant": "acme" });
    for (claim, value, expected) in [
        ("exp", json!(now - 30), Ok("acme".to_owned())),
        ("exp", json!(now - 90), Err(Denied::Expired)),
        ("exp", json!("tomorrow"), Err(Denied::Token)),
        ("exp", Value::Null, Err(Denied::Token)),
        ("exp", json!(-1), Err(Denied::Token)),
        ("nbf", json!(now + 30), Ok("acme".to_owned())),
        ("nbf", json!(now + 90), Err(Denied::Token)),
        ("nbf", json!("soon"), Err(Denied::Token)),
        ("iss", json!("https://evil.example"), Err(Denied::Token)),
        ("iss", Value::Null, Err(Denied::Token)),
        ("aud", json!("somebody else"), Err(Denied::Token)),
        ("aud", json!([]), Err(Denied::Token)),
        ("aud", Value::Null, Err(Denied::Token)),
        ("tenant", json!(7), Err(Denied::Tenant)),
        ("tenant", Value::Null, Err(Denied::Tenant)),
    ] {
        let mut claims = good.clone();
        match &value {
            Value::Null => drop(claims.as_object_mut().unwrap().remove(claim)),
            value => claims[claim] = value.clone(),
        }
        let token = issuer.token(&json!({ "alg": "ES256", "kid": "ec" }), &claims);
        assert_eq!(provider.tenant(&token), expected, "{claim}: {value}");
    }
}

#[test]
fn signatures_cannot_be_left_out_or_mistaken() {
    let issuer = Issuer::new();
    let provider_of_all = provider(&issuer, &ALL).unwrap();
    let claims = json!({ "iss": ISSUER, "aud": "baton", "exp": unix_seconds() + 60, "tenant": "acme" });
    let sign = |header: Value| issuer.token(&header, &claims);
    let good = sign(json!({ "alg": "ES256", "kid": "ec" }));
    let (message, signature) = good.rsplit_once('.').unwrap();
    let (header, body) = message.split_once('.').unwrap();
    let other = b64(json!({ "iss": ISSUER, "aud": "baton", "exp": unix_seconds() + 60, "tenant": "root" })
        .to_string()
        .as_bytes());
    for token in [
        sign(json!({ "alg": "none" })),
        sign(json!({ "alg": "None" })),
        sign(json!({ "alg": "HS256", "kid": "shared" })),
        sign(json!({ "alg": "HS256" })),
        // A condition that is not understood.
        sign(json!({ "alg": "ES256", "kid": "ec", "crit": ["b64"], "b64": false })),
        // The key of another kind, the key of somebody else, no such key.
        sign(json!({ "alg": "ES256", "kid": "rsa" })),
        sign(json!({ "alg": "RS256", "kid": "ec" })),
        sign(json!({ "alg": "ES256", "kid": "gone" })),
        format!("{header}.{other}.{signature}"),
        format!("{header}.{body}."),
        format!("{header}.{body}"),
        format!("{header}.{body}.{signature}A"),
        format!("{header}.{body}.{signature}.x"),
        format!("{RSA_TOKEN}x"),
        "..".to_owned(),
        "\u{0}".to_owned(),
    ] {
        assert!(provider_of_all.tenant(&token).is_err(), "{token}");
    }
    // What the fleet document does not allow is not taken, however good.
    let only_rsa = provider(&issuer, &[JwtAlgorithm::Rs256]).unwrap();
    assert_eq!(only_rsa.tenant(&good), Err(Denied::Token));
    assert!(matches!(provider(&issuer, &[JwtAlgorithm::Es384]), Err(JwksError::Empty { .. })));
}
