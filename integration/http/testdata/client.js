// A client in Node: client.js http|undici BASE [CERT KEY CA]. It fetches bytes
// of all sizes and stores some, counted and in chunks, on connections that it
// keeps. It prints ok when all came back as it was.
'use strict'
const assert = require('assert')
const fs = require('fs')
const { Readable } = require('stream')
const [, , kind, base, cert, key, ca] = process.argv
const tls = cert ? { cert: fs.readFileSync(cert), key: fs.readFileSync(key), ca: fs.readFileSync(ca) } : {}

function pattern (size) {
  const b = Buffer.alloc(size)
  for (let i = 0; i < size; i++) b[i] = i % 251
  return b
}

// ask returns {status, headers, body}. A body that is a stream goes in chunks.
let ask, end
if (kind === 'http') {
  const lib = base.startsWith('https') ? require('https') : require('http')
  const agent = new lib.Agent({ keepAlive: true, maxSockets: 1, ...tls })
  end = () => agent.destroy()
  ask = (method, path, body) => new Promise((resolve, reject) => {
    const headers = Buffer.isBuffer(body) ? { 'Content-Length': body.length } : {}
    const req = lib.request(base + path, { method, agent, headers }, res => {
      const parts = []
      res.on('data', part => parts.push(part))
      res.on('end', () => resolve({ status: res.statusCode, headers: res.headers, body: Buffer.concat(parts) }))
      res.on('error', reject)
    })
    req.on('error', reject)
    if (body && body.pipe) body.pipe(req)
    else req.end(body)
  })
} else {
  const { Client } = require('undici')
  const client = new Client(base, { pipelining: 4, connect: tls })
  end = () => client.close()
  ask = async (method, path, body) => {
    const res = await client.request({ method, path, body })
    return { status: res.statusCode, headers: res.headers, body: Buffer.from(await res.body.arrayBuffer()) }
  }
}

async function main () {
  for (const size of [0, 1024, 1 << 20]) {
    const want = pattern(size)
    const got = await ask('GET', '/bytes/' + size)
    assert.strictEqual(got.status, 200)
    assert(got.body.equals(want), `GET of ${size} bytes`)
    for (const [how, body] of [['counted', want], ['chunked', Readable.from(size ? [want.subarray(0, size / 3), want.subarray(size / 3)] : [])]]) {
      const path = `/store/${kind}-${how}-${size}`
      const put = await ask('PUT', path, body)
      assert(put.status === 201 || put.status === 204, `PUT ${path}: ${put.status}`)
      assert((await ask('GET', path)).body.equals(want), `GET ${path}`)
    }
  }
  const head = await ask('HEAD', '/bytes/1024')
  assert.strictEqual(head.headers['content-length'], '1024')
  assert.strictEqual(head.body.length, 0)
  const many = await Promise.all([10, 20, 30, 40, 50].map(size => ask('GET', '/bytes/1024').then(got => got.body.length)))
  assert.deepStrictEqual(many, [1024, 1024, 1024, 1024, 1024])
  await end()
  console.log('ok')
}
main()
