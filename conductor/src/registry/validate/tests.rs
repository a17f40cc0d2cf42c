use super::*;

#[test]
fn addresses_are_ones_that_others_can_connect_to() {
    for good in ["127.0.0.1:7500", "[::1]:1", "worker-0.pool.svc.cluster.local:65535", "localhost:7501"] {
        assert_eq!(address(good), Ok(()), "{good}");
    }
    let bad = [
        "",
        ":",
        "localhost",
        "localhost:",
        ":7500",
        "localhost:0",
        "localhost:65536",
        "localhost:+80",
        "0.0.0.0:80",
        "[::]:80",
        "::1:80",
        "224.0.0.1:80",
        "1.2.3:80",
        "1.2.3.256:80",
        "a b:80",
        "http://x:80",
        "x/y:80",
        "-x:80",
        "x..y:80",
        "[localhost]:80",
        "x:80:90",
        "user@host:80",
        "host\n:80",
    ];
    for bad in bad {
        assert!(address(bad).is_err(), "{bad:?}");
    }
    assert!(address(&format!("{}:80", "a".repeat(300))).is_err());
}

#[test]
fn servers_are_urls_without_anything_but_an_address() {
    for (good, expected) in [
        ("http://10.0.0.5:8000", "10.0.0.5:8000"),
        ("http://gpu-1", "gpu-1:80"),
        ("https://[fd00::5]", "[fd00::5]:443"),
    ] {
        assert_eq!(authority(good).as_deref(), Ok(expected));
    }
    for bad in [
        "",
        "10.0.0.5:8000",
        "ftp://a:1",
        "http://",
        "http://a:8000/v1",
        "http://u@a:8000",
        "http://0.0.0.0:8000",
    ] {
        assert!(authority(bad).is_err(), "{bad:?}");
    }
}
