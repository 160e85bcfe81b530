// What the fuzzers start from: small valid files, so that they need not find the format by themselves.

/** A safetensors file of tensors {name: {dtype, shape, data: Uint8Array}}. */
function safetensors(tensors, metadata) {
  let at = 0;
  const header = metadata ? { __metadata__: metadata } : {};
  for (const [name, { dtype, shape, data }] of Object.entries(tensors)) {
    header[name] = { dtype, shape, data_offsets: [at, at + data.length] };
    at += data.length;
  }
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  return Buffer.concat([length, text, ...Object.values(tensors).map(({ data }) => data)]);
}

const f32 = (...shape) => ({ dtype: 'F32', shape, data: Buffer.alloc(4 * shape.reduce((a, b) => a * b, 1)) });
const bytes = (dtype, ...shape) => ({
  dtype,
  shape,
  data: Buffer.alloc(
    shape.reduce((a, b) => a * b, 1),
    0x5a,
  ),
});
const sizes = (...values) => {
  const data = Buffer.alloc(24);
  values.forEach((value, i) => {
    data.writeBigInt64LE(BigInt(value), 8 * i);
  });
  return { dtype: 'I64', shape: [3], data };
};

/** {fuzzer: {name: bytes}} */
export function fuzzSeeds() {
  const header = (json) => Buffer.concat([Buffer.from([2]), Buffer.from(json)]); // 2: one unit of 64 bytes of data
  return {
    fuzz_safetensors: {
      file: Buffer.concat([Buffer.from([0]), safetensors({ a: f32(2, 2), b: bytes('U8', 3) }, { format: 'pt' })]),
      header: header(
        '{"a":{"dtype":"F32","shape":[4,2],"data_offsets":[0,32]},"b":{"dtype":"BF16","shape":[16],"data_offsets":[32,64]}}',
      ),
      escapes: header(
        '{"__metadata__":{"\\u00e9\\n":"\\ud83d\\ude00"},"x":{"data_offsets":[0,64],"shape":[64],"dtype":"I8"}}  ',
      ),
    },
    fuzz_checkpoint: {
      plain: safetensors({ w: bytes('U8', 96), a: f32(3), c: f32(16), s: sizes(4, 48, 64) }),
      nested: safetensors({
        w: bytes('U8', 96),
        a: bytes('U8', 3),
        c: f32(16),
        n: f32(1),
        m: f32(256),
        s: sizes(4, 48, 64),
      }),
      int8: safetensors({ w: bytes('I8', 4, 5), a: f32(4), s: sizes(4, 5, 0) }),
      dense: safetensors({ w: bytes('BF16', 0, 5), s: sizes(0, 5, 0) }),
    },
  };
}
