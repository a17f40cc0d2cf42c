//! Drivers of accelerators against stand-ins for the vendors' libraries, and against real hardware where there is some.
//!
//! A stand-in is compiled by the C compiler and loaded before the driver looks for the real library, which it then
//! finds already there by its name. One process can have one library of a name: all tests here use the stand-ins.
#![cfg(test)]

mod cuda;
mod fakes;
mod neuron;
mod suite;
