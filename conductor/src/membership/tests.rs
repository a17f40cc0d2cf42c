use std::collections::VecDeque;
use std::sync::Mutex;

use axum::extract::State;
use axum::routing::{delete, post};
use axum::{Json, Router};
use http::StatusCode;

use super::*;
use crate::ClientOptions;
use crate::api::{ErrorBody, ErrorDetail};
use crate::record::WorkerRecord;

const PATIENCE: Duration = Duration::from_secs(20);

/// A conductor that answers as it is told to, and remembers in which states the worker was.
#[derive(Default)]
struct Script {
    /// Codes of refusals of keepalives; afterwards all is well.
    keepalives: Mutex<VecDeque<&'static str>>,
    /// Statuses of answers to goodbyes; afterwards all is well.
    leaves: Mutex<VecDeque<u16>>,
    registered: Mutex<Vec<WorkerState>>,
    kept: Mutex<Vec<(Epoch, WorkerState)>>,
    left: Mutex<u32>,
}

type Answer = (StatusCode, String);

fn refuse(status: u16, code: &str) -> Answer {
    let (message, kind) = ("no".to_owned(), "conflict_error".to_owned());
    let error = ErrorDetail { message, kind, code: code.to_owned(), holder: None };
    (StatusCode::from_u16(status).unwrap(), serde_json::to_string(&ErrorBody { error }).unwrap())
}

async fn register(State(script): State<Arc<Script>>, Json(asked): Json<Register>) -> Answer {
    let mut registered = script.registered.lock().unwrap();
    registered.push(asked.state);
    let epoch = Epoch(registered.len() as u64);
    let granted =
        Registered { epoch, revision: epoch.0, ttl_ms: 600_000, keepalive_ms: 200_000, drain: false };
    (StatusCode::CREATED, serde_json::to_string(&granted).unwrap())
}

async fn keep_alive(State(script): State<Arc<Script>>, Json(asked): Json<Keepalive>) -> Answer {
    script.kept.lock().unwrap().push((asked.epoch, asked.state));
    match script.keepalives.lock().unwrap().pop_front() {
        Some(code) => refuse(409, code),
        None => {
            let kept = Kept { ttl_ms: 600_000, drain: false };
            (StatusCode::OK, serde_json::to_string(&kept).unwrap())
        }
    }
}

async fn goodbye(State(script): State<Arc<Script>>) -> Answer {
    *script.left.lock().unwrap() += 1;
    match script.leaves.lock().unwrap().pop_front() {
        Some(status) => refuse(status, "no"),
        None => (StatusCode::NO_CONTENT, String::new()),
    }
}

async fn conductor(script: &Arc<Script>) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let app = Router::new()
        .route("/v1/workers", post(register))
        .route("/v1/workers/{worker}/keepalive", post(keep_alive))
        .route("/v1/workers/{worker}", delete(goodbye))
        .with_state(script.clone());
    TaskTracker::new().spawn(async move { axum::serve(listener, app).await });
    format!("http://{address}")
}

async fn join(endpoints: Vec<String>) -> Membership {
    let client = Client::start(ClientOptions::new(endpoints)).unwrap();
    let registration = Registration {
        worker: "w".parse().unwrap(),
        pool: "decode".parse().unwrap(),
        role: Role::Decode,
        model: "tiny".to_owned(),
        engine: "reference".to_owned(),
        kv: None,
        server: None,
        address: "127.0.0.1:1".to_owned(),
        transfer: String::new(),
        state: WorkerState::Joining,
    };
    let options = MembershipOptions { leave_timeout: PATIENCE, ..MembershipOptions::default() };
    Membership::join(&client, registration, options).await.unwrap()
}

#[tokio::test]
async fn who_was_superseded_begins_another_life_at_once_and_in_the_state_it_is_in() {
    let script = Arc::new(Script::default());
    script.keepalives.lock().unwrap().push_back("stale_epoch");
    let membership = join(vec![conductor(&script).await]).await;
    membership.set_state(WorkerState::Ready);
    let mut epochs = membership.epoch();
    let second = epochs.wait_for(|epoch| *epoch == Some(Epoch(2)));
    tokio::time::timeout(PATIENCE, second).await.expect("long before the lease would have ended").unwrap();
    assert_eq!(*script.registered.lock().unwrap(), [WorkerState::Joining, WorkerState::Ready]);
    // Draining is final, whatever is said afterwards.
    for state in [WorkerState::Draining, WorkerState::Ready] {
        membership.set_state(state);
    }
    let said = async {
        loop {
            let kept = script.kept.lock().unwrap().clone();
            if let Some((_, state)) = kept.iter().find(|(epoch, _)| *epoch == Epoch(2)) {
                return *state;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert_eq!(tokio::time::timeout(PATIENCE, said).await.expect("it is told"), WorkerState::Draining);
    membership.leave().await;
}

#[tokio::test]
async fn a_goodbye_is_told_to_the_next_conductor_and_again_to_one_with_a_fault_of_its_own() {
    let (distrusts, fails) = (Arc::new(Script::default()), Arc::new(Script::default()));
    distrusts.leaves.lock().unwrap().extend([401; 8]);
    fails.leaves.lock().unwrap().push_back(503);
    let membership = join(vec![conductor(&distrusts).await, conductor(&fails).await]).await;
    membership.leave().await;
    assert_eq!(*fails.left.lock().unwrap(), 2, "refused once, and then taken");
}

#[tokio::test]
async fn a_wish_to_drain_that_is_seen_beside_another_life_is_not_for_this_one() {
    let client = Client::start(ClientOptions::new(vec!["http://127.0.0.1:1".to_owned()])).unwrap();
    let worker: WorkerId = "w".parse().unwrap();
    let record = |epoch| WorkerRecord {
        worker: worker.clone(),
        epoch: Epoch(epoch),
        pool: "decode".parse().unwrap(),
        role: Role::Decode,
        model: "tiny".to_owned(),
        engine: "reference".to_owned(),
        kv: None,
        server: None,
        address: "127.0.0.1:1".to_owned(),
        transfer: "".into(),
        state: WorkerState::Ready,
        pid: 1,
    };
    let view = |epoch: Option<u64>, wished: bool| View {
        workers: Arc::new(epoch.map(|epoch| (worker.clone(), Arc::new(record(epoch)))).into_iter().collect()),
        drain: Arc::new(wished.then(|| worker.clone()).into_iter().collect()),
        ..View::clone(&client.view())
    };
    // The process before it in the name, itself, and one that has taken its name.
    let of_life = |life| is_to_drain(&view(Some(life), true), &worker, Epoch(2));
    assert_eq!([1, 2, 3].map(of_life), [false, true, false]);
    assert!(!is_to_drain(&view(None, true), &worker, Epoch(2)), "it is not in view yet");
    assert!(!is_to_drain(&view(Some(2), false), &worker, Epoch(2)), "nobody wishes it");
}
