// A yardstick for `run.py`, for what a good general-purpose library reaches: Bun's `server.publish` (uWebSockets) behind the
// same Redis channel, with subscriptions to projects and nothing else.
//
// What a user could write instead in an afternoon: Bun (uWebSockets) + its Redis client. Subscribes per project, fans out.
const port = Number(process.env.PORT ?? 9003);
const redis = new Bun.RedisClient(process.env.REDIS_URL ?? "redis://127.0.0.1:6401");
const server = Bun.serve<{ id: string }, never>({
  port, hostname: "127.0.0.1",
  fetch(req, srv) { if (srv.upgrade(req, { data: { id: crypto.randomUUID() } })) return; return new Response("no", { status: 400 }); },
  websocket: {
    idleTimeout: 120, sendPings: true, perMessageDeflate: false,
    open(ws) { ws.subscribe("all"); ws.send(JSON.stringify({ type: "connection.established", client_id: ws.data.id, timestamp: new Date().toISOString() })); },
    message(ws, m) { const d = JSON.parse(String(m)); if (d.type === "subscribe") { ws.subscribe("p:" + d.project_id); ws.send(JSON.stringify({ type: "subscription.confirmed", project_id: d.project_id })); } },
  },
});
await redis.subscribe("websocket:broadcast", (message: string) => {
  const e = JSON.parse(message);
  server.publish(e.project_id ? "p:" + e.project_id : "all", message);
});
console.log("bun gateway on", port);
