// Runs named checks one after another and sets the exit status.
export async function run(title, checks) {
  let failed = 0;
  for (const [name, check] of Object.entries(checks)) {
    try {
      await check();
      console.log(`ok ${name}`);
    } catch (error) {
      failed += 1;
      console.log(`FAILED ${name}: ${error}`);
    }
  }
  const total = Object.keys(checks).length;
  console.log(`${title}: ${total - failed} passed, ${failed} failed`);
  process.exit(failed ? 1 : 0);
}

export function ensure(holds, what) {
  if (!holds) throw new Error(what);
}

export const weather = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 } },
  required: ["city"],
  additionalProperties: false,
};
