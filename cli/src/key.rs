//! `baton key`: makes keys for the file of keys.

use serde_json::json;

use crate::args::{KeyArgs, KeyCommand};
use crate::failure::Failure;
use crate::output;

pub(crate) fn run(args: &KeyArgs) -> Result<(), Failure> {
    let KeyCommand::New { tenant, json } = &args.command;
    let minted = baton_router::mint(tenant).map_err(|error| match error {
        baton_router::MintError::Tenant(_) => Failure::Usage(error.to_string()),
        baton_router::MintError::Entropy(_) => Failure::of(&error),
    })?;
    let text = if *json {
        format!("{}\n", json!({ "tenant": tenant, "key": minted.key, "line": minted.line }))
    } else {
        format!(
            "key, shown this once:\n  {}\nline for `keys:` of the tenant {tenant} in the file of keys:\n  {}\n",
            minted.key, minted.line
        )
    };
    output::print(&text)
}
