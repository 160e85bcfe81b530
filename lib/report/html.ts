/** HTML out of template strings: what is filled in is escaped, unless it is HTML itself. */

export interface Html {
  readonly html: string;
}

type Value = string | number | Html | readonly Html[];

export function html(strings: TemplateStringsArray, ...values: readonly Value[]): Html {
  return { html: strings.map((text, i) => text + (i < values.length ? rendered(values[i] as Value) : '')).join('') };
}

/** Text that is HTML, CSS or JavaScript already. */
export function raw(text: string): Html {
  return { html: text };
}

/** JSON inside a script element, where only '</script' and '<!--' could end it: no '<' is left. */
export function embeddedJson(value: unknown): Html {
  return raw(JSON.stringify(value).replaceAll('<', '\\u003c'));
}

function rendered(value: Value): string {
  if (typeof value !== 'object') return escaped(String(value));
  return 'html' in value ? value.html : value.map(({ html }) => html).join('');
}

const entities: Readonly<Record<string, string>> = {
  '&': '&amp;',
  '<': '&lt;',
  '>': '&gt;',
  '"': '&quot;',
  "'": '&#39;',
};

function escaped(text: string): string {
  return text.replace(/[&<>"']/g, (c) => entities[c] as string);
}
