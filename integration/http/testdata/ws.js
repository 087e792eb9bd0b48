// WebSockets in Node: ws.js serve PORT, or ws.js call URL [CERT KEY CA]. The
// client prints ok when all came back as it was, and how it was closed.
'use strict'
const assert = require('assert')
const crypto = require('crypto')
const fs = require('fs')
const { WebSocket, WebSocketServer } = require('ws')
const [, , what, where, cert, key, ca] = process.argv

if (what === 'serve') {
  const server = new WebSocketServer({ host: '127.0.0.1', port: Number(where), maxPayload: 32 << 20 })
  server.on('connection', ws => {
    ws.on('message', (data, binary) => ws.send(data, { binary }))
  })
} else {
  const ws = new WebSocket(where, cert ? { cert: fs.readFileSync(cert), key: fs.readFileSync(key), ca: fs.readFileSync(ca) } : {})
  const once = event => new Promise(resolve => ws.once(event, (...args) => resolve(args)))
  const echo = async data => {
    const answer = once('message')
    ws.send(data)
    const [got] = await answer
    assert(got.equals(Buffer.from(data)), 'not what was sent')
  }
  ws.on('error', err => { console.log('error', err.message); process.exitCode = 1 })
  ws.on('close', code => { console.log('closed', code); process.exit() })
  ws.on('open', async () => {
    for (let i = 0; i < 100; i++) await echo('message ' + i)
    for (const size of [0, 125, 126, 65535, 65536, 4 << 20]) await echo(crypto.randomBytes(size)) // what is compressed stays as large
    const pong = once('pong')
    ws.ping('are you there')
    assert.strictEqual(String((await pong)[0]), 'are you there')
    console.log('ok')
  })
}
