//! Requests that servers of other projects answer: let in like any other, checked as far as every server would, passed on.

use std::sync::Arc;

use http::{Request, Response};
use hyper::body::Incoming;
use tokio::time::Instant;

use super::{Gateway, named_id, refused};
use crate::account::Entry;
use crate::admit::Place;
use crate::answer::AnswerBody;
use crate::dispatch::Explanation;
use crate::entropy;
use crate::forward::{Asked, Forwarder};
use crate::reply::Refusal;
use crate::request::{Passing, parse_passed};
use crate::room::Body;
use crate::tenant::Principal;

impl Gateway {
    /// Answers a request through a server of another project.
    pub(super) async fn pass_on(
        self: Arc<Self>,
        forwarder: Arc<Forwarder>,
        passing: Passing,
        request: Request<Incoming>,
        entry: Entry,
        principal: Arc<Principal>,
    ) -> Response<AnswerBody> {
        let response = match self.ask(&forwarder, passing, request, &principal).await {
            Ok((asked, place)) => {
                let explanation: Option<Explanation> = asked.explain.clone();
                let response = forwarder.answer(asked, entry, place).await;
                return self.annotated(response, explanation.as_ref(), &principal);
            }
            Err(refusal) => refused(entry, &refusal, passing.dialect()),
        };
        self.annotated(response, None, &principal)
    }

    /// Everything before servers are involved.
    async fn ask(
        self: &Arc<Self>,
        forwarder: &Arc<Forwarder>,
        passing: Passing,
        request: Request<Incoming>,
        principal: &Principal,
    ) -> Result<(Asked, Place), Refusal> {
        let started = Instant::now();
        let placing = self.placing(request.headers(), principal.tenant.admin);
        self.check_wait(request.headers())?;
        let (body, place) = self.admit(request, principal).await?;
        let fields = Arc::clone(forwarder);
        let parse = move |this: &Self, Body { bytes, held }: Body| {
            let passed = parse_passed(passing, &bytes, &this.bounds(), &fields.extra_fields)?;
            Ok((passed, held))
        };
        let (request, held) = self.work(principal, body, parse).await?;
        if let Some(model) = request.model() {
            self.check_model(model)?;
        }
        let placing = placing.or_user(request.user.as_deref());
        let asked = Asked {
            passing,
            request,
            _held: held,
            id: new_id()?,
            cache_salt: self.auth.salt(principal)?,
            owner: self.auth.owner(principal),
            session: placing.session,
            explain: placing.explain,
            started,
            deadline: started + self.timeouts.request,
        };
        Ok((asked, place))
    }
}

fn new_id() -> Result<String, Refusal> {
    let random = entropy::bytes::<12>().map_err(|error| {
        tracing::error!(%error, "no random numbers from the system");
        Refusal::Internal
    })?;
    Ok(named_id("req-", &random))
}
