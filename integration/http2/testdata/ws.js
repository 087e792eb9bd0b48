// A WebSocket over HTTP/2 (RFC 8441) in Node: ws.js BASE PATH [CERT KEY CA]. It
// prints ok when all came back as it was, and how it was closed.
'use strict'
const assert = require('assert')
const crypto = require('crypto')
const fs = require('fs')
const http2 = require('http2')
const [, , base, path, cert, key, ca] = process.argv
const session = http2.connect(base, cert ? { cert: fs.readFileSync(cert), key: fs.readFileSync(key), ca: fs.readFileSync(ca) } : {})

// frame is one of a client (RFC 6455, section 5.2).
function frame (kind, data) {
  let head
  if (data.length < 126) head = Buffer.from([128 | kind, 128 | data.length])
  else if (data.length < 65536) { head = Buffer.from([128 | kind, 254, 0, 0]); head.writeUInt16BE(data.length, 2) } else {
    head = Buffer.alloc(10); head[0] = 128 | kind; head[1] = 255; head.writeBigUInt64BE(BigInt(data.length), 2)
  }
  const mask = crypto.randomBytes(4)
  const masked = Buffer.from(data)
  for (let i = 0; i < masked.length; i++) masked[i] ^= mask[i & 3]
  return Buffer.concat([head, mask, masked])
}

session.on('error', err => { console.log('error', err.message); process.exit(1) })
session.on('remoteSettings', settings => {
  assert(settings.enableConnectProtocol, 'extended CONNECT is not offered')
  const stream = session.request({ ':method': 'CONNECT', ':protocol': 'websocket', ':path': path, ':scheme': cert ? 'https' : 'http', 'sec-websocket-version': '13' }, { endStream: false })
  let rest = Buffer.alloc(0)
  let wanted = () => {}
  stream.on('data', part => { rest = Buffer.concat([rest, part]); wanted() })
  stream.on('error', () => {})
  stream.on('close', () => { console.log('closed', stream.rstCode); session.destroy() })

  // next resolves with the next whole message: {kind, data}.
  const next = () => new Promise(resolve => {
    const parts = []
    wanted = () => {
      for (;;) {
        if (rest.length < 2) return
        let size = rest[1] & 127
        let at = 2
        if (size === 126) { if (rest.length < 4) return; size = rest.readUInt16BE(2); at = 4 }
        if (size === 127) { if (rest.length < 10) return; size = Number(rest.readBigUInt64BE(2)); at = 10 }
        if (rest.length < at + size) return
        const [first] = rest
        parts.push(rest.subarray(at, at + size))
        rest = rest.subarray(at + size)
        if (first & 128) { resolve({ kind: first & 15, data: Buffer.concat(parts) }); wanted = () => {}; return }
      }
    }
    wanted()
  })

  stream.on('response', async headers => {
    console.log('status', headers[':status'])
    if (headers[':status'] !== 200) return
    for (const size of [0, 5, 125, 126, 65535, 65536, 1 << 20]) {
      const data = crypto.randomBytes(size)
      stream.write(frame(2, data))
      const got = await next()
      assert(got.data.equals(data), `${size} bytes`)
    }
    stream.write(frame(9, Buffer.from('are you there')))
    const { kind, data } = await next()
    assert.deepStrictEqual([kind, String(data)], [10, 'are you there'])
    console.log('ok')
  })
})
