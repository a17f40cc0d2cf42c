//! Scalers over TLS, as they are met outside of a laptop.

use axum::serve::Listener;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::*;
use crate::test_authority::Authority;

fn roots(authority: &Authority) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem.as_bytes()).unwrap()).unwrap();
    roots
}

/// Takes those who speak TLS and, where `clients` is given, show a certificate of that authority.
struct Secure {
    tcp: TcpListener,
    tls: TlsAcceptor,
}

impl Secure {
    async fn bind(authority: &Authority, clients: Option<&Authority>) -> Self {
        let (cert, key) = authority.identity(&["localhost"]);
        let ring = Arc::new(rustls::crypto::ring::default_provider());
        let builder =
            ServerConfig::builder_with_provider(ring.clone()).with_safe_default_protocol_versions().unwrap();
        let builder = match clients {
            Some(clients) => {
                let roots = Arc::new(roots(clients));
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, ring).build().unwrap();
                builder.with_client_cert_verifier(verifier)
            }
            None => builder.with_no_client_auth(),
        };
        let chain = vec![CertificateDer::from_pem_slice(cert.as_bytes()).unwrap()];
        let config =
            builder.with_single_cert(chain, PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap()).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self { tcp, tls: TlsAcceptor::from(Arc::new(config)) }
    }
}

impl Listener for Secure {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (stream, from) = self.tcp.accept().await.unwrap();
            if let Ok(stream) = self.tls.accept(stream).await {
                return (stream, from);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.tcp.local_addr()
    }
}

#[tokio::test]
async fn a_web_hook_over_https_is_believed_by_the_authority_of_its_file() {
    let (ours, other) = (Authority::new(), Authority::new());
    let directory = tempfile::tempdir().unwrap();
    let ca_file = directory.path().join("ca.pem");
    std::fs::write(&ca_file, &other.pem).unwrap();
    let (fake, address) = Fake::serve(Secure::bind(&ours, None).await);
    let url = format!("https://localhost:{}/hook", address.port());
    let pool = "p".parse().unwrap();
    let notice = Notice { pool: &pool, role: Role::Both, desired: 1, ready: 1, reason: "", id: "" };
    let spec = WebhookSpec { ca_file: Some(ca_file.clone()), ..webhook(url) };
    let problem = Webhook::new(spec.clone()).tell(&notice).await.unwrap_err().to_string();
    assert!(problem.contains("UnknownIssuer") || problem.contains("BadSignature"), "{problem}");
    assert!(fake.calls().is_empty());
    std::fs::write(&ca_file, &ours.pem).unwrap();
    Webhook::new(spec).tell(&notice).await.unwrap();
    assert_eq!(fake.calls().len(), 1);
}

#[tokio::test]
async fn a_kubeconfig_names_the_server_its_authority_and_who_asks() {
    let (servers, clients) = (Authority::new(), Authority::new());
    let (fake, address) = Fake::serve(Secure::bind(&servers, Some(&clients)).await);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kubeconfig");
    let known = |(cert, key): (String, String)| json!({ "client-certificate-data": STANDARD.encode(cert), "client-key-data": STANDARD.encode(key) });
    let write = |authority: &Authority, user: Value| {
        let server = format!("https://localhost:{}", address.port());
        let file = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{ "name": "c", "cluster": { "server": server, "certificate-authority-data": STANDARD.encode(&authority.pem) } }],
            "users": [{ "name": "u", "user": user }],
            "contexts": [{ "name": "it", "context": { "cluster": "c", "user": "u" } }],
        });
        std::fs::write(&path, file.to_string()).unwrap();
    };
    let scaler = || Kubernetes::new(KubernetesSpec { kubeconfig: Some(path.clone()), ..spec("prefill") });

    let problem = scaler().current().await.unwrap_err().to_string();
    assert!(problem.starts_with("there is no way to Kubernetes ("), "{problem}");
    for (authority, user) in [(&clients, known(clients.identity(&["conductor"]))), (&servers, json!({}))] {
        write(authority, user);
        let problem = scaler().current().await.unwrap_err().to_string();
        assert!(problem.starts_with("the Kubernetes API server can't be reached: "), "{problem}");
    }
    assert!(fake.calls().is_empty());
    write(&servers, known(clients.identity(&["conductor"])));
    let mut scaler = scaler();
    assert_eq!(scaler.current().await.unwrap(), 2);
    assert_eq!(scaler.scale(5).await.unwrap(), 5);
    assert_eq!(scaler.current().await.unwrap(), 5);
}
