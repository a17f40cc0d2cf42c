use expect_test::expect;

use super::*;

const GOOD: &str = "version: 1
tenants:
  - name: acme
    weight: 4
    priority: 2
    admin: true
    max_wait_ms: 1500
    limits: { requests_per_min: 600, tokens_per_min: 100000, concurrency: 8 }
    keys:
      - { id: a1b2c3d4, hash: \"hmac-sha256:000102030405060708090a0b0c0d0e0f:00000000000000000000000000000000000000000000000000000000000000ff\" }
      - id: e5f6a7b8
        hash: hmac-sha256:000102030405060708090a0b0c0d0e0f:00000000000000000000000000000000000000000000000000000000000000fe
        expires: 2027-12-31
        limits: { concurrency: 2 }
  - name: guests
";

#[test]
fn a_file_is_read_whole() {
    let file = KeysFile::parse(GOOD, "keys.yaml").unwrap();
    let [acme, guests] = file.tenants.as_slice() else { panic!("two tenants") };
    assert_eq!((acme.weight, acme.priority, acme.admin), (4, 2, true));
    assert_eq!(acme.max_wait, Some(Duration::from_millis(1500)));
    assert_eq!((guests.weight, guests.priority, guests.admin, guests.keys.len()), (1, 0, false, 0));
    let [first, second] = acme.keys.as_slice() else { panic!("two keys") };
    assert_eq!(first.limits, acme.limits, "a key without limits has those of its tenant");
    assert_eq!(second.limits, Quota { concurrency: Some(2), ..acme.limits });
    assert_eq!(second.hash[31], 0xfe);
    // The first second of 2028.
    assert_eq!((first.expires, second.expires), (None, Some(1_830_297_600)));
    let line = format!("version: 1\ntenants: [{{ name: a, keys: [{}] }}]\n", &first.line()[2..]);
    let again = KeysFile::parse(&line, "keys.yaml").unwrap();
    assert_eq!((again.tenants[0].keys[0].salt, again.tenants[0].keys[0].hash), (first.salt, first.hash));
}

#[test]
fn every_fault_is_listed_and_no_secret_shown() {
    let text = "version: 2
tenants:
  - name: Acme Inc
    weight: 0
  - name: b
    keys:
      - { id: bk-x-SECRET, hash: bk-abcd-THISISASECRET }
      - { id: abcd, hash: \"hmac-sha256:00:11\", expires: tomorrow }
      - { id: efgh, key: bk-abcd-THISISASECRET, limits: { requests_per_min: 0, tokens: 5 } }
  - name: c
    keys: [{ id: same, hash: \"hmac-sha256:000102030405060708090a0b0c0d0e0f:00000000000000000000000000000000000000000000000000000000000000ff\" }]
  - name: c
    keys: [{ id: same, hash: \"hmac-sha256:000102030405060708090a0b0c0d0e0f:00000000000000000000000000000000000000000000000000000000000000ff\", expires: 2027-02-29 }]
";
    let faults = KeysFile::parse(text, "keys.yaml").unwrap_err().to_string();
    assert!(!faults.contains("SECRET"), "{faults}");
    expect![[r#"
        keys.yaml:1:10: version: is 2, which is not 1, the only version there is
          remedy: write 1, the only version there is
        keys.yaml:3:11: tenants[0].name: is Acme Inc, which is not 1 to 64 characters of a-z, 0-9, -, _ and .
          remedy: write 1 to 64 characters of a-z, 0-9, -, _ and .
        keys.yaml:4:13: tenants[0].weight: is 0, which is not a whole number from 1 to 1000
          remedy: write a whole number from 1 to 1000 (the default is 1)
        keys.yaml:7:15: tenants[1].keys[0].id: is not 4 to 32 characters of a-z and 0-9
          remedy: paste the line that `baton key new` prints
        keys.yaml:7:34: tenants[1].keys[0].hash: is not hmac-sha256:SALT:HASH
          remedy: paste the line that `baton key new` prints
        keys.yaml:8:27: tenants[1].keys[1].hash: is not hmac-sha256:SALT:HASH
          remedy: paste the line that `baton key new` prints
        keys.yaml:8:57: tenants[1].keys[1].expires: is tomorrow, which is not a day like 2027-12-31, or a time like 2027-12-31T18:00:00Z
          remedy: write a day like 2027-12-31, or a time like 2027-12-31T18:00:00Z
        keys.yaml:9:9: tenants[1].keys[2].hash: is missing
          remedy: write `hash:` with the hash that `baton key new` prints
        keys.yaml:9:21: tenants[1].keys[2].key: unknown key `key`
          remedy: remove it; the keys here are id, hash, expires, limits
        keys.yaml:9:77: tenants[1].keys[2].limits.requests_per_min: is 0, which is not a whole number from 1 to 1000000000000
          remedy: write a whole number from 1 to 1000000000000
        keys.yaml:9:80: tenants[1].keys[2].limits.tokens: unknown key `tokens`
          remedy: remove it; the keys here are requests_per_min, tokens_per_min, concurrency
        keys.yaml:12:11: tenants[3].name: c occurs a second time
          remedy: put all keys of a tenant into one entry
        keys.yaml:13:18: tenants[3].keys[0].id: same is a key of c already
          remedy: make another key with `baton key new`
        keys.yaml:13:152: tenants[3].keys[0].expires: is 2027-02-29, which is not a day like 2027-12-31, or a time like 2027-12-31T18:00:00Z
          remedy: write a day like 2027-12-31, or a time like 2027-12-31T18:00:00Z
        14 faults in keys.yaml"#]].assert_eq(&faults);
}

#[test]
fn times_are_seconds_since_1970() {
    for (text, seconds) in [
        ("1970-01-01T00:00:00Z", Some(0)),
        ("1970-01-01", Some(86_400)),
        ("2000-02-29T12:00:00Z", Some(951_825_600)),
        ("2026-11-21T08:35:07Z", Some(1_795_250_107)),
        ("2100-02-29", None),
        ("2027-13-01", None),
        ("2027-00-01", None),
        ("2027-1-01", None),
        ("2027-01-01T24:00:00Z", None),
        ("2027-01-01T00:00:00", None),
        ("2027-01-01T00:00:00+01:00", None),
        ("1969-12-31", None),
        ("", None),
    ] {
        assert_eq!(parse_time(text), seconds, "{text}");
    }
}

#[test]
fn a_file_that_is_not_there_says_so() {
    let error = KeysFile::load(Path::new("/nonexistent/keys.yaml")).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/keys.yaml") && error.contains("No such file"), "{error}");
    assert_eq!(Stamp::of(Path::new("/nonexistent/keys.yaml")), None);
}
