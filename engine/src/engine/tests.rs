mod basics;
mod harness;
