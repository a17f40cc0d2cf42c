//! Whole fleets of real processes, driven from outside. One binary, because each would link all the libraries.
#![cfg(test)]

mod autoscale;
mod boundaries;
mod conductors;
mod drain;
mod etcd_fleet;
mod fabrics;
mod faults;
mod keys;
mod kubernetes;
mod membership;
mod official_clients;
mod proof;
mod routers;
mod routing;
mod servers;
mod soak;
mod sockets;
mod up;
