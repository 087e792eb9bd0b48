// A client of HTTP/2 in Node: client.js BASE [CERT KEY CA]. It fetches bytes of
// all sizes and stores some, many at a time on its one connection. It prints ok
// when all came back as it was.
'use strict'
const assert = require('assert')
const fs = require('fs')
const http2 = require('http2')
const [, , base, cert, key, ca] = process.argv
const session = http2.connect(base, cert ? { cert: fs.readFileSync(cert), key: fs.readFileSync(key), ca: fs.readFileSync(ca) } : {})

function pattern (size) {
  const b = Buffer.alloc(size)
  for (let i = 0; i < size; i++) b[i] = i % 251
  return b
}

const ask = (method, path, body, fields) => new Promise((resolve, reject) => {
  const stream = session.request({ ':method': method, ':path': path, ...fields }, { endStream: body === undefined })
  const parts = []
  const got = { hints: [] }
  stream.on('headers', h => got.hints.push(h[':status']))
  stream.on('response', h => { got.headers = h; got.status = h[':status'] })
  stream.on('trailers', h => { got.trailers = h })
  stream.on('data', part => parts.push(part))
  stream.on('end', () => resolve({ ...got, body: Buffer.concat(parts) }))
  stream.on('error', reject)
  if (body !== undefined) stream.end(body)
})

async function main () {
  await Promise.all([0, 1024, 1 << 20].map(async size => {
    const want = pattern(size)
    const got = await ask('GET', '/bytes/' + size)
    assert.strictEqual(got.status, 200)
    assert(got.body.equals(want), `GET of ${size} bytes`)
    for (const fields of [{}, { 'content-length': size }]) {
      const path = `/store/node-${Object.keys(fields).length}-${size}`
      const put = await ask('PUT', path, want, fields)
      assert(put.status === 201 || put.status === 204, `PUT ${path}: ${put.status}`)
      assert((await ask('GET', path)).body.equals(want), `GET ${path}`)
    }
  }))
  const head = await ask('HEAD', '/bytes/1024')
  assert.strictEqual(head.headers['content-length'], '1024')
  assert.strictEqual(head.body.length, 0)
  const many = await Promise.all(Array.from({ length: 100 }, () => ask('GET', '/bytes/1024').then(got => got.body.length)))
  assert(many.every(n => n === 1024))
  session.close()
  console.log('ok')
}
main()
