//! `baton top`: the status on a whole terminal, looked at again and again.

use std::io::IsTerminal;
use std::time::Duration;

use baton_config::environment::Environment;
use tokio::time::{Instant, sleep};

use super::{ask, text, watch};
use crate::args::TopArgs;
use crate::failure::Failure;
use crate::output;
use crate::remote::{Conductors, block_on};
use crate::signals::Signals;

/// Another screen than the shell's, without a cursor; what is wider than it is cut.
const OPEN: &str = "\x1b[?1049h\x1b[?25l\x1b[?7l";
const CLOSE: &str = "\x1b[?7h\x1b[?25h\x1b[?1049l";
/// Lines of a terminal that does not tell.
const LINES: usize = 24;

pub(crate) fn run(args: &TopArgs, environment: &Environment) -> Result<(), Failure> {
    let conductors = Conductors::named(&args.conductor, environment)?;
    let every = Duration::from_secs(args.every.into());
    match std::io::stdout().is_terminal() {
        true => block_on(view(&conductors, every)),
        // One picture after the other.
        false => block_on(watch(&conductors, every, false)),
    }
}

/// The terminal, which is the shell's again when this is dropped.
struct Screen;

impl Screen {
    fn open() -> Result<Self, Failure> {
        output::print(OPEN)?;
        Ok(Self)
    }

    fn lines() -> usize {
        let size = rustix::termios::tcgetwinsize(std::io::stdout());
        size.ok().map(|size| usize::from(size.ws_row)).filter(|lines| *lines > 0).unwrap_or(LINES)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing.
        let _ = output::print(CLOSE);
    }
}

async fn view(conductors: &Conductors, every: Duration) -> Result<(), Failure> {
    let mut signals = Signals::listen()?;
    let _screen = Screen::open()?;
    let (mut picture, mut taken) = (String::new(), Instant::now());
    loop {
        let looked = tokio::select! {
            () = signals.next() => return Ok(()),
            looked = ask(conductors) => looked,
        };
        let head = match looked {
            Ok(status) => {
                (picture, taken) = (text::describe(&status, false), Instant::now());
                format!("baton top, every {} s; Ctrl-C ends it", every.as_secs())
            }
            Err(failure) if picture.is_empty() => format!("error: {failure}"),
            Err(failure) => format!("{} s old: {failure}", taken.elapsed().as_secs()),
        };
        if !output::print_on(&frame(&head, &picture, Screen::lines()))? {
            return Ok(());
        }
        tokio::select! {
            () = signals.next() => return Ok(()),
            () = sleep(every) => {}
        }
    }
}

/// What replaces all that is on a screen of so many lines.
fn frame(head: &str, picture: &str, lines: usize) -> String {
    let all: Vec<&str> = [head, ""].into_iter().chain(picture.lines()).collect();
    let more;
    let shown = match all.len() > lines {
        false => all,
        true => {
            let kept = lines.saturating_sub(1);
            more = format!("... and {} more lines: `baton status` has them all", all.len() - kept);
            all[..kept].iter().copied().chain([more.as_str()]).collect()
        }
    };
    // Line by line over what was there: a screen that is cleared first flickers.
    format!("\x1b[H{}\x1b[K\x1b[J", shown.join("\x1b[K\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_has_as_many_lines_as_the_terminal_and_says_what_is_left_out() {
        let lines = |frame: String| -> Vec<String> {
            let body = frame.strip_prefix("\x1b[H").and_then(|rest| rest.strip_suffix("\x1b[K\x1b[J"));
            body.unwrap().split("\x1b[K\n").map(str::to_owned).collect()
        };
        assert_eq!(lines(frame("head", "a\nb\n", 4)), ["head", "", "a", "b"]);
        let cut = lines(frame("head", "a\nb\nc\n", 4));
        assert_eq!(cut, ["head", "", "a", "... and 2 more lines: `baton status` has them all"]);
        assert_eq!(lines(frame("head", "a\n", 1)).len(), 1);
    }
}
