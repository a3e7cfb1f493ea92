//! demo
use crate::run::Checkout;
#[derive(clap::Args)]
pub(crate) struct Args {}
pub(crate) fn run(_: &Checkout, _: &Args) -> anyhow::Result<()> {
    Ok(())
}
