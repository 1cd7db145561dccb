// The form sends POST /orders to where the page is from, and shows the answer as text.
'use strict';

const form = document.getElementById('try');
const answer = document.getElementById('answer');

const fresh = () => {
  const bytes = crypto.getRandomValues(new Uint8Array(16)); // randomUUID is there over HTTPS alone
  form.elements.key.value = Array.from(bytes, (b) => b.toString(16).padStart(2, '0')).join('');
};

form.addEventListener('submit', async (event) => {
  event.preventDefault();
  const { key, token, prefer, body } = form.elements;
  const headers = { 'Idempotency-Key': key.value };
  if (token.value) headers.Authorization = `Bearer ${token.value}`;
  if (prefer.value) headers.Prefer = prefer.value;
  if (body.value) headers['Content-Type'] = 'application/json';
  answer.hidden = false;
  answer.textContent = '…';
  try {
    const response = await fetch('/orders', { method: 'POST', headers, body: body.value || undefined });
    const lines = [...response.headers].map(([name, value]) => `${name}: ${value}`);
    answer.textContent = `${response.status}\n${lines.join('\n')}\n\n${await response.text()}`;
  } catch (error) {
    answer.textContent = `${error}`;
  }
});

document.getElementById('fresh').addEventListener('click', fresh);
fresh();
