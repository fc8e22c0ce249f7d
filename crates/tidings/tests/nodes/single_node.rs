//! One node with streams of its own: the suite has to be clean where there is nothing to share, and to notice what is lost where
//! nothing is kept.

use std::time::Duration;

use tokio::time::sleep;

use crate::{
    node::Node,
    stage::{Load, Outcome, Stage, Store, alone},
};

#[test]
fn a_node_that_keeps_its_own_journal_is_killed_and_loses_nothing() {
    alone(async {
        let node = Node::started("single", &[("TIDINGS_ENGINE", "embedded")]).await;
        let mut stage = Stage::set(vec![node], Load::usual()).await;
        for _ in 0..2 {
            sleep(Duration::from_secs(1)).await;
            stage.nodes[0].kill();
            sleep(Duration::from_millis(500)).await;
            stage.nodes[0].start().await;
        }
        stage.finish("single node killed twice", Store::Keeps).await;
    });
}

#[test]
fn a_node_that_keeps_nothing_is_killed_and_everybody_is_told() {
    alone(async {
        let settings = [("TIDINGS_ENGINE", "embedded"), ("TIDINGS_PERSIST", "false")];
        let node = Node::started("forgetful", &settings).await;
        let mut stage = Stage::set(vec![node], Load::usual()).await;
        stage.nodes[0].kill();
        stage.nodes[0].start().await;
        let Outcome { verdict, witnesses, _nodes } =
            stage.finish("single node without a journal", Store::Forgets).await;
        let subscriptions: usize = witnesses.iter().map(|witness| witness.projects.len()).sum();
        assert_eq!(verdict.told_gaps, subscriptions);
        assert!(verdict.taken_back > 0);
    });
}
