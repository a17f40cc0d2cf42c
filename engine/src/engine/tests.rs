mod basics;
mod harness;
mod invariance;
mod simulation;
